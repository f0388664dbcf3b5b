"""A domain's splits, and success rates with their intervals. evaluate.py makes them, report.py shows them."""

from types import ModuleType

from common.errors import UserError

# The protocol of every success rate here, next to the domain's own. Older results do not name it.
COMMON_PROTOCOL = {"episode_ends": "at the first success"}


# How the costs of several stages add up. A stage of an earlier version may lack one.
COSTS = {"seconds": sum, "env_steps": sum, "vlm_forwards": sum, "peak_gb": max}


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return (low, high), the 95 % interval of a success rate k/n (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p = k / n
    centre = p + z * z / (2 * n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def splits(domain: ModuleType) -> dict[str, list[str]]:
    """Return {"expert" | "rl" | "unseen": task names} of a domain, without a split that has no task."""
    every = {"expert": domain.EXPERT_TASKS, "rl": domain.RL_TASKS, "unseen": domain.UNSEEN_TASKS}
    return {split: tasks for split, tasks in every.items() if tasks}


def all_tasks(domain: ModuleType) -> list[str]:
    """Return all of a domain's task names: expert, RL, unseen."""
    return [*domain.EXPERT_TASKS, *domain.RL_TASKS, *domain.UNSEEN_TASKS]


def check_task(task: str, domain: ModuleType) -> None:
    """Raise UserError for a task that the domain does not have."""
    if task not in all_tasks(domain):
        raise UserError(f"unknown task {task!r}: choose from {', '.join(all_tasks(domain))}")


def summary(tasks: dict[str, dict], domain: ModuleType) -> str:
    """Return one line on an evaluation's tasks: expert 0.83 [0.80, 0.86] (519/625), rl ..."""
    parts = []
    for split, names in splits(domain).items():
        outcomes = [outcome for t in names if t in tasks for outcome in tasks[t]["success"]]
        if outcomes:
            k = sum(outcomes)
            n = len(outcomes)
            low, high = wilson(k, n)
            parts.append(f"{split} {k / n:.2f} [{low:.2f}, {high:.2f}] ({k}/{n})")
    return ", ".join(parts)


def costs(stages: list[dict]) -> dict[str, float]:
    """Return what some stages cost together: {name: number} of COSTS, without those that one of them lacks."""
    return {
        name: add(s[name] for s in stages)
        for name, add in COSTS.items()
        if all(name in s for s in stages)
    }
