"""The table of fault campaigns, which `scripts/faults` runs, and of which `test_campaign.py` runs a small part."""

from functools import partial

from tests.faults import damaged_results, links, operation_faults, random_kills, scenarios, signals, two_at_once
from tests.faults.campaign import Campaign
from tests.faults.mutations import MUTATIONS

# What a quick campaign is limited to, as each command that is prepared takes seconds.
QUICK_SCENARIOS = (
    "train recipe.yaml", "check recipe.yaml --set data.max_length=100",
    "export runs/a --to gguf-adapter --out out.gguf --verify file --force",
    "adapter resize runs/a --rank 2 --out out --force",
)  # fmt: skip
QUICK_RECIPES = ("best",)
QUICK_TARGETS = ("checkpoint", "cache")
QUICK_LINKS = ("train recipe.yaml --resume", "adapter inspect runs/new --json out.json")


def campaigns(*, quick: bool) -> dict[str, Campaign]:
    """Return all campaigns by their key on the command line.

    Args:
        quick: whether only a few commands are tried, and only campaigns whose cases take a few seconds.
    """
    names = QUICK_SCENARIOS if quick else tuple(scenarios.SCENARIOS)
    recipes = QUICK_RECIPES if quick else random_kills.RECIPES
    targets = QUICK_TARGETS if quick else tuple(damaged_results.TARGETS)
    linked = QUICK_LINKS if quick else tuple(links.COMMANDS)
    shared = ("commands", partial(scenarios.prepare, names=names))
    attempt = operation_faults.try_case

    def of_operations(title: str, fault: operation_faults.Fault, share: float) -> Campaign:
        return Campaign(title, *shared, operation_faults.cases(fault), attempt, None, share)

    table = {
        "random": Campaign(
            "training, killed at a random moment", "runs", partial(random_kills.prepare, recipes=recipes),
            random_kills.cases, random_kills.try_case, 520, 3,  # some come too late
        ),
        "processes": Campaign(
            "training in two processes, one killed", "runs-of-two", partial(random_kills.prepare, recipes=["two"]),
            random_kills.cases_of_two, random_kills.try_case, 12,
        ),
        "kill": of_operations("killed before a file operation", "kill", 3),
        "cut": of_operations("killed within a write", "cut", 2),
        "error": of_operations("a file operation fails", "error", 3),
        "limit": of_operations("the size of files is limited", "limit", 1),
        "disk": of_operations("the disk is full", "disk", 1),
        "vanish": of_operations("files vanish", "vanish", 1),
        "damage": Campaign(
            "damaged files", "damaged", partial(damaged_results.prepare, names=targets),
            damaged_results.cases, damaged_results.try_case, None, 3,
        ),
        "links": Campaign(
            "links in place of files", "links", partial(links.prepare, commands=linked),
            links.cases, links.try_case, 700,
        ),
        "signals": Campaign(
            "signals in every phase", "signals", signals.prepare, signals.cases, signals.try_case, 400, 2
        ),
        "two": Campaign("two commands at once", *shared, two_at_once.cases, two_at_once.try_case, 150),
        **MUTATIONS,
    }  # fmt: skip
    return {key: campaign for key, campaign in table.items() if not (quick and key == "processes")}
