"""Weights for programs without diffzoo: ONNX, archives of torch.export, and diffusers' layout.

ONNX and torch.export hold D(x; sigma) of `diffzoo.interop.KDenoiser`: clean images from images plus noise of standard
deviation sigma, with everything that the process does inside. The smallest sampler is then Euler's:

    for sigma, next in pairwise(sigmas):
        x = x + (next - sigma) * (x - D(x, sigma, label)) / sigma
"""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffzoo.encoders import KLAutoencoder
from diffzoo.errors import MissingExtraError, UserError
from diffzoo.generation import Pipeline
from diffzoo.interop import KDenoiser
from diffzoo.models.dit import DiTConfig
from diffzoo.process import DiscreteBetas
from diffzoo.zoo.converters.dit import to_official

__all__ = ["Portable", "export_diffusers", "export_onnx", "export_pt2"]

OPSET = 18


@dataclass(frozen=True)
class Portable:
    """What was written, and how to call it.

    Args:
        path: file or folder.
        inputs: names, in order.
        about: what a program needs to know: shape, noise levels, classes, licence, where the weights came from.
    """

    path: Path
    inputs: tuple[str, ...]
    about: dict[str, object]

    def __str__(self) -> str:
        return f"{self.path}: {', '.join(self.inputs)} -> denoised"


def _traced(pipe: Pipeline) -> tuple[KDenoiser, dict[str, Tensor], dict[str, dict[int, object]]]:
    """The module, an example of its inputs, and which of their sizes may vary."""
    generator = pipe.generator
    if generator.kind == "image":
        raise UserError("upsamplers read small images as well: export the model that samples from noise")
    generator.network.requires_grad_(False)
    example = {"x": torch.randn(2, *generator.shape), "sigma": torch.tensor([0.5, 2.0])}
    if generator.kind == "class":
        example["label"] = torch.tensor([0, 1]) % generator.num_classes
    if generator.kind == "caption":
        config = generator.network.config
        tokens, width = int(config.text_tokens or 0), int(config.text_width or 0)
        example["text"] = torch.randn(2, tokens, width)
        example["text_mask"] = torch.ones(2, tokens, dtype=torch.bool)
    batch = torch.export.Dim("batch", min=1, max=4096)
    return KDenoiser(generator.denoiser).eval(), example, {name: {0: batch} for name in example}


def _about(pipe: Pipeline, module: KDenoiser) -> dict[str, object]:
    metadata = pipe.metadata
    return {
        "model": metadata.title,
        "shape": list(pipe.generator.shape),
        "sigma_min": module.sigma_min,
        "sigma_max": module.sigma_max,
        "classes": pipe.classes.count,
        "class_names": list(pipe.classes.names),
        "autoencoder": metadata.autoencoder.repo if metadata.autoencoder else None,
        "licence": metadata.licence,
        "weights": str(metadata.provenance),
    }


def export_onnx(pipe: Pipeline, path: Path) -> Portable:
    """Write an ONNX file of D(x; sigma) for any batch size; what it needs to be used lies in its metadata.

    Raises:
        UserError: for upsamplers; if the packages are missing.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "onnx", "the export to ONNX") from error
    module, example, sizes = _traced(pipe)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.export.export(module, (), example, dynamic_shapes=_for_forward(sizes), strict=True)
        program = torch.onnx.export(
            traced,
            kwargs=example,
            input_names=list(example),
            output_names=["denoised"],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _in_float32(model.graph)
    about = _about(pipe, module)
    onnx.helper.set_model_props(model, {"diffzoo": json.dumps(about)})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return Portable(path, tuple(example), about)


def _in_float32(graph: Any) -> None:
    """Let the functions that onnxruntime has in float32 alone compute in that, between casts."""
    from onnx import TensorProto, helper

    nodes = []
    for node in graph.node:
        if node.op_type not in ("Atan", "Tan"):
            nodes.append(node)
            continue
        given, result = node.input[0], node.output[0]
        node.input[0], node.output[0] = f"{given}_single_{result}", f"{result}_single"
        nodes.append(helper.make_node("Cast", [given], [node.input[0]], to=TensorProto.FLOAT))
        nodes.append(node)
        nodes.append(helper.make_node("Cast", [node.output[0]], [result], to=TensorProto.DOUBLE))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)


def export_pt2(pipe: Pipeline, path: Path, compiled: bool = False) -> Portable:
    """Write an archive of `torch.export`, or, compiled, of AOTInductor for this kind of machine.

    `torch.export.load(path).module()(x=..., sigma=..., label=...)`, or compiled
    `torch._inductor.aoti_load_package(path)(x=..., ...)`, need torch alone.
    """
    module, example, sizes = _traced(pipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        program = torch.export.export(module, (), example, dynamic_shapes=_for_forward(sizes), strict=True)
        if compiled:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        else:
            about = json.dumps(_about(pipe, module))
            torch.export.save(program, path, extra_files={"diffzoo.json": about})
    return Portable(path, tuple(example), _about(pipe, module))


def _for_forward(sizes: dict[str, dict[int, object]]) -> dict[str, dict[int, object] | None]:
    return {name: sizes.get(name) for name in ("x", "sigma", "label", "text", "text_mask") if name in sizes}


# -- diffusers

FIELDS = (
    "image_size",
    "in_channels",
    "num_classes",
    "null_class",
    "patch",
    "width",
    "depth",
    "heads",
    "learned_variance",
)


def export_diffusers(pipe: Pipeline, folder: Path) -> Portable:
    """Write the folder of a `DiTPipeline`: transformer, scheduler, the autoencoder as it is, and the names of classes.

    Raises:
        UserError: for other networks than DiT's own, since diffusers has no layers for them.
    """
    try:
        from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
    except ModuleNotFoundError as error:
        raise MissingExtraError("diffusers", "latent", "the export to diffusers") from error
    network, process, autoencoder = pipe.network, pipe.process, pipe.generator.autoencoder
    config, schedule = network.config, process.schedule
    if (
        not isinstance(config, DiTConfig)
        or config != DiTConfig(**{name: getattr(config, name) for name in FIELDS})
        or not isinstance(schedule, DiscreteBetas)
        or not isinstance(autoencoder, KLAutoencoder)
    ):
        raise UserError(
            f"diffusers has the layers of DiT alone, with its autoencoder and steps, not those of "
            f"{pipe.metadata.title}: export onnx or pt2"
        )
    transformer: Any = DiTTransformer2DModel(  # diffusers states no types
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.in_channels,
        out_channels=config.in_channels * (2 if config.learned_variance else 1),
        num_layers=config.depth,
        attention_bias=True,
        sample_size=config.image_size,
        patch_size=config.patch,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    )
    state = _diffusers_state(to_official(network.state_dict(), config))
    missing, unknown = transformer.load_state_dict(state, strict=False)
    assert not unknown, unknown
    assert set(missing) <= {"pos_embed.pos_embed"}, missing  # a constant
    scheduler = DDIMScheduler(
        num_train_timesteps=schedule.steps,
        beta_schedule="squaredcos_cap_v2" if schedule.kind == "cosine" else schedule.kind,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        clip_sample=False,
    )
    names = dict(enumerate(pipe.classes.names))
    whole: Any = DiTPipeline(transformer, autoencoder.model, scheduler, id2label=names or None)
    whole.save_pretrained(folder)
    return Portable(folder, ("class_labels",), {"licence": pipe.metadata.licence})


_BLOCK = {
    "attn.proj.": "attn1.to_out.0.",
    "mlp.fc1.": "ff.net.0.proj.",
    "mlp.fc2.": "ff.net.2.",
    "adaLN_modulation.1.": "norm1.linear.",
}
_WHOLE = {
    "x_embedder.proj.": "pos_embed.proj.",
    "final_layer.adaLN_modulation.1.": "proj_out_1.",
    "final_layer.linear.": "proj_out_2.",
}
_EVERY = {  # diffusers keeps one in each block
    "t_embedder.mlp.0.": "norm1.emb.timestep_embedder.linear_1.",
    "t_embedder.mlp.2.": "norm1.emb.timestep_embedder.linear_2.",
    "y_embedder.embedding_table.": "norm1.emb.class_embedder.embedding_table.",
}


def _diffusers_state(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official state dict of DiT under diffusers' names."""
    depth = 1 + max(int(name.split(".")[1]) for name in official if name.startswith("blocks."))
    state: dict[str, Tensor] = {}
    for name, value in official.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if block and block[2].startswith("attn.qkv."):
            for part, letter in zip(value.chunk(3), "qkv", strict=True):
                state[f"transformer_blocks.{block[1]}.attn1.to_{letter}.{block[2].rsplit('.', 1)[1]}"] = part
        elif block:
            state[f"transformer_blocks.{block[1]}.{_renamed(block[2], _BLOCK)}"] = value
        elif any(name.startswith(prefix) for prefix in _EVERY):
            state |= {f"transformer_blocks.{i}.{_renamed(name, _EVERY)}": value for i in range(depth)}
        elif name != "pos_embed":
            state[_renamed(name, _WHOLE)] = value
    return {name: value.clone() for name, value in state.items()}


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    prefix = next(prefix for prefix in rules if name.startswith(prefix))
    return rules[prefix] + name.removeprefix(prefix)
