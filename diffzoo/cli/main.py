"""The command `diffzoo`: a plain front that answers help at once and imports a verb only when it runs.

A verb is a module of this package with two functions, `configure(parser)` and `run(args) -> int`. `fit` and
`validate` hand their arguments to LightningCLI unread.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from diffzoo.errors import UserError, did_you_mean

__all__ = ["main"]

# verb: (module, one line of help)
VERBS = {
    "quickstart": ("diffzoo.cli.quickstart", "train a small model on the demo data and sample from it, in minutes"),
    "list": ("diffzoo.cli.list", "names of the registered models"),
    "describe": ("diffzoo.cli.describe", "parameters, multiply-adds and levels of a model"),
    "fit": ("diffzoo.cli.fit", "train from a recipe: diffzoo fit -c RECIPE [--key value ...]"),
    "validate": ("diffzoo.cli.fit", "validation loss of a run: diffzoo validate --run RUN"),
    "sample": ("diffzoo.cli.sample", "sample images from a run, a checkpoint or a published model"),
    "compare": ("diffzoo.cli.compare", "settings, samplers, runs or EMAs side by side on the same seeds"),
    "demo": ("diffzoo.cli.demo", "a page in the browser that samples, compares and edits"),
    "eval": ("diffzoo.cli.eval", "evaluate by a stated protocol; compare results"),
    "sweep": ("diffzoo.cli.sweep", "search guidance scale and interval"),
    "study": ("diffzoo.cli.study", "train and evaluate the arms of an ablation; table, plots, verdicts"),
    "report": ("diffzoo.cli.report", "one HTML file about a run, or about several side by side"),
    "plot": ("diffzoo.cli.plot", "noise schedules and weightings of recipes and weights in one plot"),
    "recipes": ("diffzoo.cli.recipes", "list, show or copy the recipes that ship"),
    "data": ("diffzoo.cli.data", "inspect a source, cache latents, compute statistics"),
    "verify": ("diffzoo.cli.verify", "prove that a published checkpoint is the original"),
    "push": ("diffzoo.cli.push", "publish a run or checkpoint on the Hub"),
    "pull": ("diffzoo.cli.pull", "fetch a model from the Hub"),
    "export": ("diffzoo.cli.export", "weights as one file with their metadata; ONNX, torch.export, diffusers"),
    "ema": ("diffzoo.cli.ema", "EMAs of other widths, reconstructed after training"),
    "plan": ("diffzoo.cli.plan", "memory and time of a recipe"),
    "doctor": ("diffzoo.cli.doctor", "versions, devices, caches and the Hub: what an issue report needs"),
}
LIGHTNING = ("fit", "validate")
# what people type, and the verb they mean
MEANT = {"train": "fit", "finetune": "fit", "resume": "fit", "generate": "sample", "draw": "sample",
         "predict": "sample", "evaluate": "eval", "fid": "eval", "models": "list", "info": "describe",
         "show": "describe", "convert": "export", "download": "pull", "upload": "push", "env": "doctor"}  # fmt: skip
RENAMED = {"--setting": "--preset", "--average": "--weights", "--averages": "--weights"}  # of earlier versions


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence, which names the nearest option."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--?[\w.-]+)", message)
        actions = [action for parser in (self, *self._verbs()) for action in parser._actions]
        known = {option for action in actions for option in action.option_strings}
        hint = did_you_mean(unknown[1], known) if unknown else ""
        raise UserError(f"{message}{hint or f'; `{self.prog} --help` shows what there is'}")

    def _verbs(self) -> list[argparse.ArgumentParser]:
        return [p for a in self._actions if isinstance(a, argparse._SubParsersAction) for p in a.choices.values()]


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {verb:<11} {text}" for verb, (_, text) in VERBS.items())
    return argparse.ArgumentParser(
        prog="diffzoo",
        usage="diffzoo VERB ...",
        description="A model zoo and trainer for image diffusion.",
        epilog=f"verbs:\n{lines}\n\n`diffzoo VERB --help` or `diffzoo help VERB` explains one; `diffzoo --version`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _of_the_machine(error: Exception) -> str:
    """What this machine refused, a path or memory, in words; "" for other errors."""
    if isinstance(error, OSError):
        path = error.filename2 or error.filename
        return f"{path} cannot be read or written: {error.strerror}" if path and error.strerror else ""
    full = isinstance(error, MemoryError) or "allocate memory" in str(error)
    return "the memory of this machine does not hold that: ask for smaller images, or fewer at once" if full else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 a verdict of "no", 2 bad input, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    # Threads of torch that wait for each other spin. On a CPU shared with other programs they burn the time that the
    # slowest of them needs: a training step took 2.5 to 10 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if args[:1] == ["help"]:
        args = [*args[1:2], "--help"]
    if args[:1] in (["--version"], ["-V"], ["version"]):
        from diffzoo import __version__

        print(__version__)
        return 0
    if not args or args[0] in ("-h", "--help"):
        _parser().print_help()
        return 0
    verb, rest = args[0], args[1:]
    try:
        return _run(verb, rest) if verb in VERBS else _unknown(verb, rest)
    except BrokenPipeError:  # `diffzoo list | head`
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("\ndiffzoo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        said = str(error) if isinstance(error, UserError) else _of_the_machine(error)
        if not said or os.environ.get("DIFFZOO_TRACEBACK"):
            raise
        print(f"diffzoo: {said}", file=sys.stderr)
        return 2


def _unknown(verb: str, rest: Sequence[str]) -> NoReturn:
    late = next((a for a in rest if a in VERBS), None)
    first = late and verb.startswith("-")
    hint = f"; the verb comes first: diffzoo {late} ..." if first else did_you_mean(verb, VERBS)
    raise UserError(f"unknown verb {verb!r}" + (f"; did you mean {MEANT[verb]!r}?" if verb in MEANT else hint))


def _run(verb: str, rest: list[str]) -> int:
    if "" not in sys.path:
        sys.path.append("")  # classes of one's own in this folder, as for `python -m`
    rest = [re.sub(r"^(--[\w.-]+=)?~(?=/)", lambda found: (found[1] or "") + os.path.expanduser("~"), a) for a in rest]
    for old in RENAMED.keys() & set(rest) if verb not in LIGHTNING else ():
        raise UserError(f"{old} is called {RENAMED[old]} now")
    module = import_module(VERBS[verb][0])
    if verb in LIGHTNING:
        return int(module.run(verb, rest))
    parser = Parser(prog=f"diffzoo {verb}", description=VERBS[verb][1], allow_abbrev=False)
    module.configure(parser)
    settings: list[str] = []
    if hasattr(module, "split_settings"):  # a verb that takes settings of a recipe besides its own options
        settings, rest = module.split_settings(rest)
    return int(module.run(parser.parse_args(rest, argparse.Namespace(settings=settings))))


if __name__ == "__main__":
    sys.exit(main())
