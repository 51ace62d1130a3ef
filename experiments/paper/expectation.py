"""What the file of a method says that it takes and scores, from records."""

from experiments.paper.evidence import GROUPS, Evidence, common_places, mean_over
from experiments.paper.statistics import interval, written


def expectation(evidence: Evidence, method: str) -> str | None:
    """Minutes of one core and accuracy in %, means over seeds, on the first task that has the method.

    None where no task has it.
    """
    task = next((task for task in evidence.tasks if method in evidence.cells[task]), None)
    if task is None:
        return None
    seconds = [r["seconds"] for r in evidence.training if (r["task"], r["method"]) == (task, method)]
    scores = []
    for group in GROUPS:
        if places := common_places(evidence, task, [method], group):
            found = interval(mean_over(evidence, task, method, places, "accuracy").values())
            scores.append(f"{group} {written(found and found._replace(half=None), 100, 1)}")
    minutes = sum(seconds) / 60 / len(seconds)
    return (
        f"Expected time and score: {minutes:.0f} minutes of one core; on {task}, in %: {', '.join(scores)}."
    )
