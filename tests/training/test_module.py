"""The module is wiring: its loss is the paper's, whatever the batch is cut into, and misfits are sentences."""

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from diffzoo import rng
from diffzoo.errors import UserError
from diffzoo.models.base import Config, Network
from diffzoo.process import Cosine, GaussianProcess, Shifted, Sigmoid, UniformEps
from diffzoo.training.module import DiffusionModule
from diffzoo.training.optimizers import TimmOptimizer, parameter_groups
from diffzoo.typing import Condition
from diffzoo.zoo.metadata import read_metadata


class Tiny(Network):
    """A convolution plus a class bias plus the noise level: enough to see every argument arrive."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.label = nn.Embedding(config.class_rows, 3) if config.num_classes else None

    def forward(self, z, noise_level, cond=None):
        out = self.conv(z) + noise_level[:, None, None, None] / 10
        label = self.labels(z, cond)
        return out if label is None else out + self.label(label)[:, :, None, None]


def module(**options) -> DiffusionModule:
    torch.manual_seed(0)
    return DiffusionModule(Tiny(Config(image_size=8, num_classes=5)), **options)


def batch(n: int = 6, start: int = 100) -> dict:
    g = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (n, 3, 8, 8), generator=g, dtype=torch.uint8)
    index = torch.arange(start, start + n)
    return {"image": image, "label": torch.arange(n) % 5, "index": index, "id": index * 7}


def part(whole: dict, rows: slice) -> dict:
    return {k: v[rows] for k, v in whole.items()}


@pytest.mark.parametrize(("classes", "scale"), [(5, 2.0), (0, None)])
def test_guidance_is_that_of_networks_with_conditions(classes: int, scale: float | None) -> None:
    m = DiffusionModule(Tiny(Config(image_size=8, num_classes=classes)), guidance={"scale": 2.0})
    assert (m.guidance and m.guidance.scale) == scale


def test_training_step_is_the_paper_line_by_line() -> None:
    process = GaussianProcess(schedule=Shifted(Cosine(), 64, 32))
    m = module(process=process, weighting=Sigmoid(bias=-1.0), condition_dropout=0.0, seed=5)
    b = batch()
    loss = m.training_step(b, 0)

    x = b["image"].float() / 127.5 - 1
    t = rng.times(5, b["index"].tolist(), torch.device("cpu"))
    eps = rng.normal("eps", 5, b["index"].tolist(), (3, 8, 8), torch.device("cpu"))
    tmin = torch.atan(torch.exp(torch.tensor(-7.5, dtype=torch.float64)))
    u = tmin + t.double() * (torch.pi / 2 - 2 * tmin)
    logsnr = -2 * torch.log(torch.tan(u)) + 2 * torch.log(torch.tensor(2.0))
    dt = 4 * (torch.pi / 2 - 2 * tmin) / torch.sin(2 * u)
    alpha, sigma = (torch.sigmoid(s * logsnr).sqrt()[:, None, None, None].float() for s in (1, -1))
    z = alpha * x + sigma * eps
    v = m.network(z, logsnr.float(), Condition(label=b["label"]))
    eps_hat = sigma * z + alpha * v
    weight = torch.sigmoid(-1.0 - logsnr) * dt
    expected = (weight * (eps_hat - eps).square().mean((1, 2, 3))).mean()
    assert torch.allclose(loss.double(), expected, rtol=1e-5)


def test_loss_does_not_depend_on_how_the_global_batch_is_cut() -> None:
    m = module(condition_dropout=0.3)
    b = batch(6)
    whole = m.training_step(b, 0)
    parts = [m.training_step(part(b, rows), 0) * (rows.stop - rows.start) for rows in (slice(0, 2), slice(2, 6))]
    assert torch.allclose(whole, sum(parts) / 6, rtol=1e-6)


def test_dropout_is_a_function_of_the_place_in_the_stream() -> None:
    class Dropping(Tiny):
        def __init__(self, config: Config):
            super().__init__(config)
            self.drop = nn.Dropout(0.5)

        def forward(self, z, noise_level, cond=None):
            return self.drop(super().forward(z, noise_level, cond))

    m = DiffusionModule(Dropping(Config(image_size=8, num_classes=5)))
    first = m.training_step(batch(4), 0)
    torch.rand(7)  # whatever happened in between, as after a resume
    assert m.training_step(batch(4), 0) == first
    masks = []
    for start in (100, 104, 100):
        rng.seed_layers(m.seed, range(start, start + 4))
        masks.append(m.network.drop(torch.ones(1000)))
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])


def test_a_resume_says_that_another_memory_order_drops_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    class Dropping(Tiny):
        def __init__(self, config: Config):
            super().__init__(config)
            self.drop = nn.Dropout(0.5)

    def kept(m: DiffusionModule) -> torch.Tensor:
        rng.seed_layers(m.seed, range(4))
        layout = torch.channels_last if m.channels_last else torch.contiguous_format
        return m.network.drop(torch.ones(4, 3, 8, 8).contiguous(memory_format=layout)) != 0

    made = [DiffusionModule(Dropping(Config(image_size=8, num_classes=5)), channels_last=c) for c in (False, True)]
    assert not torch.equal(kept(made[0]), kept(made[1]))  # PyTorch draws in the order of memory
    for here in made:
        for there in (False, True):
            here.on_load_checkpoint({"diffzoo": {"channels_last": there}, "state_dict": here.state_dict()})
            said = f"channels_last is {here.channels_last} here and was {there}" in capsys.readouterr().out
            assert said == (here.channels_last != there)


def test_a_resume_says_that_another_noise_began_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    here = module()
    for held, said in (({}, True), ({"noise": rng.NOISE}, False)):
        here.on_load_checkpoint({"diffzoo": held, "state_dict": here.state_dict()})
        assert (f"is drawn by {rng.NOISE} from here on" in capsys.readouterr().out) == said


def test_conditions_are_dropped_at_the_stated_rate_and_to_the_null_class() -> None:
    m = module(condition_dropout=0.25)
    b = batch(4000)
    label = m.condition(b, b["index"].tolist()).label
    dropped = label == 5
    assert abs(dropped.float().mean() - 0.25) < 0.03
    assert torch.equal(label[~dropped], b["label"][~dropped])
    assert torch.equal(m.condition(b, None).label, b["label"])


def test_latents_are_drawn_from_their_moments() -> None:
    m = module()
    moments = torch.cat([torch.full((500, 3, 8, 8), 2.0), torch.full((500, 3, 8, 8), 0.5)], 1)
    x = m.clean({"moments": moments}, list(range(500)))
    assert abs(x.mean() - 2) < 0.01
    assert abs(x.std() - 0.5) < 0.01


def test_row_ids_stay_on_the_host_and_places_go_along() -> None:
    moved = module().transfer_batch_to_device(batch(2), torch.device("meta"), 0)
    assert moved["image"].device.type == "meta"
    assert moved["index"].device.type == moved["id"].device.type == "cpu"
    assert moved["places"].device.type == "meta"


class Data(L.LightningDataModule):
    """Batches in memory, with the facts a data module states."""

    def __init__(self, num_classes: int = 5, image_size: int = 8, batches: int = 4):
        super().__init__()
        self.num_classes, self.image_size, self.batches = num_classes, image_size, batches
        self.class_names = [f"class {i}" for i in range(num_classes)]

    def train_dataloader(self):
        return DataLoader([batch(4, 4 * i) for i in range(self.batches)], batch_size=None)

    def val_dataloader(self):
        return DataLoader([batch(4, 0)], batch_size=None)


def fit(m: DiffusionModule, data: Data, tmp_path, ckpt_path=None, **options) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **{"max_steps": 4, "enable_checkpointing": False, **options},
    )  # fmt: skip
    trainer.fit(m, datamodule=data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.filterwarnings("ignore:.*overridden `transfer_batch_to_device`.*")
class TestFitting:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (Data(num_classes=7), "data has 7 classes but .* has 5: set model.network_args.num_classes to 7"),
            (Data(num_classes=0), "data has none"),
            (Data(image_size=16), "images of 16 px but .* expects 8 px"),
        ],
        ids=["more classes", "no classes", "size"],
    )
    def test_misfit_of_data_and_network_is_a_sentence(self, data: Data, message: str, tmp_path) -> None:
        with pytest.raises(UserError, match=message):
            fit(module(), data, tmp_path)

    def test_a_run_of_an_earlier_muon_goes_on_as_it_began(self, tmp_path) -> None:
        """Then class tables were stepped by Muon too, in the group of all others."""

        def muon(groups):
            return TimmOptimizer(groups, "muon", lr=1e-3)

        m = module(optimizer=lambda groups: muon(parameter_groups(m.network, split_tables=False)))
        trainer = fit(m, Data(batches=2), tmp_path, max_steps=2)
        trainer.save_checkpoint(tmp_path / "old.ckpt")
        again = module(optimizer=muon)
        fit(again, Data(batches=2), tmp_path, ckpt_path=tmp_path / "old.ckpt")
        assert len(again.trainer.optimizers[0].param_groups) == 1
        fresh = module(optimizer=muon)
        fit(fresh, Data(), tmp_path, max_steps=1)
        assert [g.get("use_fallback") for g in fresh.trainer.optimizers[0].param_groups] == [None, True]

    def test_checkpoint_rebuilds_the_model(self, tmp_path) -> None:
        m = module(process=GaussianProcess(schedule=Shifted()))
        trainer = fit(m, Data(), tmp_path, enable_checkpointing=True)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
        held = saved["diffzoo"]
        assert held["class_names"] == [f"class {i}" for i in range(5)]
        assert held["config"]["num_classes"] == 5
        assert held["process"]["schedule"]["class"] == "diffzoo.process.Shifted"
        assert read_metadata(held, "a.ckpt") == m.metadata()
        assert set(saved["state_dict"]) == {f"network.{k}" for k in m.network.state_dict()}

    def test_training_learns(self, tmp_path) -> None:
        m = module(optimizer=lambda p: torch.optim.Adam(p, lr=3e-2), weighting=UniformEps())
        before = float(m.training_step(batch(64), 0).detach())
        fit(m, Data(batches=60), tmp_path, max_epochs=1, max_steps=60)
        m.trainer = None  # outside its loop there is nothing to log to
        assert float(m.training_step(batch(64), 0).detach()) < 0.8 * before


def test_unknown_network_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown model 'simple_uvit_xs_23'; did you mean 'simple_uvit_xs_32'"):
        DiffusionModule("simple_uvit_xs_23")


def test_overrides_need_a_name() -> None:
    with pytest.raises(UserError, match="registered name"):
        DiffusionModule(Tiny(Config(image_size=8)), network_args={"image_size": 16})
