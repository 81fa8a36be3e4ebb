from diffzoo.errors import UserError as UserError
from diffzoo.factory import create_model as create_model
from diffzoo.factory import get_pretrained_cfg as get_pretrained_cfg
from diffzoo.factory import list_models as list_models
from diffzoo.generation.pipeline import pipeline as pipeline
from diffzoo.models import is_model as is_model
from diffzoo.models import register_model as register_model
from diffzoo.models.summary import describe as describe
from diffzoo.process import GaussianProcess as GaussianProcess
from diffzoo.typing import Condition as Condition
from diffzoo.zoo import list_pretrained as list_pretrained
from diffzoo.zoo import load_any as load_any
from diffzoo.zoo import save_pretrained as save_pretrained
from diffzoo.zoo.publish import pull as pull
from diffzoo.zoo.publish import push_to_hub as push_to_hub

__version__: str
