from diffzoo.data.base import ImageDataModule as ImageDataModule
from diffzoo.data.datasets import Cifar10 as Cifar10
from diffzoo.data.datasets import Coco as Coco
from diffzoo.data.datasets import HFDataset as HFDataset
from diffzoo.data.datasets import ImageFolder as ImageFolder
from diffzoo.data.datasets import ImageNet as ImageNet
from diffzoo.data.demo import DemoData as DemoData
from diffzoo.data.latents import Latents as Latents
