"""Checks annotations at run time: `pytest --jaxtyping-packages=diffzoo.process,typecheck.checked tests/process`."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as everywhere in Python
