"""What the file of a method says that it takes and scores, from records."""

import re
import textwrap
from pathlib import Path

from experiments.configs.methods import METHODS
from experiments.paper.evidence import GROUPS, Evidence, common_places, mean_over
from experiments.paper.statistics import interval, written
from qt_jax.reporting.files import write_whole

STATED = re.compile(r'Expected time and score:.*?"""', re.DOTALL)
WIDTH = 110


def expectation(evidence: Evidence, method: str) -> str:
    """Minutes of one core and accuracy in %, means over seeds, on the first task that has the method."""
    task = next((task for task in evidence.tasks if method in evidence.cells[task]), None)
    if task is None:
        return "Expected time and score: not run yet."
    seconds = [r["seconds"] for r in evidence.training if (r["task"], r["method"]) == (task, method)]
    scores = []
    for group in GROUPS:
        if places := common_places(evidence, task, [method], group):
            found = interval(mean_over(evidence, task, method, places, "accuracy").values())
            scores.append(f"{group} {written(found and found._replace(half=None), 100, 1)}")
    minutes = round(sum(seconds) / 60 / len(seconds))
    time = "1 minute" if minutes == 1 else f"{minutes} minutes"
    return f"Expected time and score: {time} of one core; on {task}, in %: {', '.join(scores)}."


def state(evidence: Evidence, folder: Path) -> None:
    """Writes it into the docstrings of the methods' files in a folder."""
    for method in METHODS:
        file = folder / f"{method.replace('-', '_')}.py"
        stated = textwrap.fill(expectation(evidence, method), WIDTH) + '\n"""'
        write_whole(file, STATED.sub(lambda _, text=stated: text, file.read_text(), count=1))
