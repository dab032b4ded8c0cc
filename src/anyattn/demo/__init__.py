"""Real Diffusers pipelines, small and with random weights, run through every backend and against float64.

The command `anyattn demo` prints what `run_demo` returns. Needs the extra `anyattn[demo]`.
"""

from anyattn.demo.extras import MissingExtraError
from anyattn.demo.models import DemoPipeline, build_pipeline
from anyattn.demo.recipes import MODELS, TITLES, ModelName
from anyattn.demo.results import BackendRun, DemoResult, Errors, ModelResult, Status
from anyattn.demo.runner import Progress, run_demo, usable_backends
from anyattn.demo.sheet import write_contact_sheet

__all__ = [
    "MODELS",
    "TITLES",
    "BackendRun",
    "DemoPipeline",
    "DemoResult",
    "Errors",
    "MissingExtraError",
    "ModelName",
    "ModelResult",
    "Progress",
    "Status",
    "build_pipeline",
    "run_demo",
    "usable_backends",
    "write_contact_sheet",
]
