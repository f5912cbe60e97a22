"""What a run needs, computed before anything is submitted: parameters, memory, time, disk, and what jobs ask for.

Formulas and tables only; imports neither torch nor numpy, so that the workflow may ask while it builds its graph:

    bases = resources.bases(config)
    gpu = resources.gpu("h100")
    resources.of_training(config, "sft", bases, gpu).mem_mb

All figures are estimates, for choosing a layout and a time limit. Where one rests on a measurement, the code says on
which.
"""

from vlm.resources.bases import Bases, bases
from vlm.resources.gpus import GPUS, Gpu, gpu
from vlm.resources.jobs import Resources, of_conversion, of_generation, of_training

__all__ = ["GPUS", "Bases", "Gpu", "Resources", "bases", "gpu", "of_conversion", "of_generation", "of_training"]
