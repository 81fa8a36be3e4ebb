"""Classes as people name them: by number, or by any of their names."""

from dataclasses import dataclass

from diffzoo.errors import UserError, did_you_mean

__all__ = ["Classes"]


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Args:
        count: how many there are.
        names: in order of the class index; empty if they are not known. An ImageNet class may have several names,
            separated by ", ".
    """

    count: int
    names: tuple[str, ...] = ()

    def index(self, wanted: str | int) -> int:
        """The index of a class, by index or by any of its names.

        Raises:
            UserError: for an index out of range, an unknown name, naming the nearest, or a name of several classes,
                naming their numbers.
        """
        if isinstance(wanted, str) and wanted in self.names and all(name.isdecimal() for name in self.names):
            return self.names.index(wanted)  # class folders that are numbers are called by these, not by their place
        if not isinstance(wanted, str) or wanted.lstrip("-").isdigit():
            if not 0 <= int(wanted) < self.count:
                raise UserError(f"class {wanted} is out of range: this model has classes 0 to {self.count - 1}")
            return int(wanted)
        if not self.names:
            raise UserError(
                f"the classes of this model have no names: use a number from 0 to {self.count - 1}, not {wanted!r}"
            )
        called = {i: {name, *name.split(", ")} for i, name in enumerate(self.names)}
        found = [i for i, names in called.items() if wanted.casefold() in {name.casefold() for name in names}]
        if not found:
            hint = did_you_mean(wanted, set().union(*called.values()))
            raise UserError(f"no class is called {wanted!r}, and this model reads no captions{hint}")
        if len(found) > 1:  # two ImageNet classes are a crane
            numbers = " and ".join(f"{i} ({self.names[i]})" for i in found)
            raise UserError(
                f"{wanted!r} is the name of several classes, {numbers}: give the number of the one you mean"
            )
        return found[0]

    def label(self, index: int) -> str:
        """What to call a class: its first name, else its number."""
        return self.names[index].split(", ")[0] if self.names else f"class {index}"
