"""Evaluate a checkpoint: infilling by exact match and edit similarity, and tasks by pass@k.

tasks.py       what is asked: the files of HumanEval and HumanEval-Infilling
holes.py       infilling tasks cut from any folder of code
completing.py  tasks to completions, through the engine
infilling.py   fillings compared with what was there
samples.py     samples for the public harnesses, and running them here
execution.py   generated code in processes with limits; sandbox.py is what runs in them
metrics.py     exact match, edit similarity, pass@k
records.py     results with their provenance, continued after a kill
lm_eval_tasks/ task files for EleutherAI's lm-evaluation-harness
"""

from mqa_gpt.evaluation.completing import complete, solution_bits
from mqa_gpt.evaluation.execution import Limits, Outcome, run_program
from mqa_gpt.evaluation.holes import cut_holes, read_files
from mqa_gpt.evaluation.infilling import evaluate_infilling
from mqa_gpt.evaluation.metrics import edit_similarity, exact_match, pass_at_k, summarize_passes
from mqa_gpt.evaluation.records import open_records
from mqa_gpt.evaluation.samples import read_samples, run_samples, write_samples
from mqa_gpt.evaluation.tasks import Task, read_tasks

__all__ = [
    "Limits",
    "Outcome",
    "Task",
    "complete",
    "cut_holes",
    "edit_similarity",
    "evaluate_infilling",
    "exact_match",
    "open_records",
    "pass_at_k",
    "read_files",
    "read_samples",
    "read_tasks",
    "run_program",
    "run_samples",
    "solution_bits",
    "summarize_passes",
    "write_samples",
]
