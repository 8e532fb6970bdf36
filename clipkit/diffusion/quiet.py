"""Keep transformers and diffusers from telling what is no news: bars for each file, a projection that is left out."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Only errors are told, and no progress bars drawn, while folders of both libraries are read and written."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = of_transformers.get_verbosity(), of_diffusers.get_verbosity(), of_transformers.is_progress_bar_enabled()
    of_transformers.set_verbosity_error()
    of_diffusers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    of_diffusers.disable_progress_bar()
    try:
        yield
    finally:
        of_transformers.set_verbosity(before[0])
        of_diffusers.set_verbosity(before[1])
        of_diffusers.enable_progress_bar()
        if before[2]:
            of_transformers.enable_progress_bar()
