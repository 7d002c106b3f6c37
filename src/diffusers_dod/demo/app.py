# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The command that serves the demo. Gradio is imported when it runs, not before."""

import os

from ..options import parse_options
from .settings import DemoOptions


def main(argv: list[str] | None = None) -> None:
    """
    Loads the pipeline and serves the page until it is interrupted.

    Args:
        argv (`list[str]`, *optional*): Arguments of the command; those of the process if not given.

    Raises:
        `ImportError`: there is no Gradio.
        `ValueError`, `OSError`: there is no such pipeline, or the port is taken.
    """
    options = parse_options(DemoOptions, argv, "Serves a page for the browser that samples a pipeline.")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it sends to its makers otherwise; read at its import
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError('The demo needs Gradio, got none: pip install "diffusers-dod[demo]" installs it.') from error
    from ._page import serve

    serve(options)
