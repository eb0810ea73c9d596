"""Whatever dies, freezes or breaks at whatever moment: every stream goes on with the tokens of the undisturbed run.

A test is a number: `scenario_of` says what goes wrong under it. `MANYHANDS_CHURN_SEEDS` names others than those of a
usual run ("0-499", "137"); `make soak` runs many, and `make soak SEEDS=137` one again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from checkpoints import PROMPTS, Checkpoint, ids, make_checkpoint
from churn import Answer, ChurnHouse, Order, Run
from scenario import FEWEST_TOKENS, MODELS, PLANS, Moment, Scenario, scenario_of
from wires import Wires

from benchmarks.nursery import Nursery
from manyhands.cluster import DEMO_MODEL

pytestmark = pytest.mark.processes
CHUNK = "64"  # prompt tokens in a step: a long prompt takes several
GREEDY: dict[str, Any] = {"ignore_eos": True}
SAMPLED: dict[str, Any] = {"ignore_eos": True, "temperature": 0.9, "top_p": 0.95}
SOURCE = Path(asyncio.__file__).with_name("queues.py")
ORDERS: dict[str, list[Order]] = {
    "random": [
        (PROMPTS[0], {**GREEDY, "max_tokens": 20}),
        (PROMPTS[1], {**SAMPLED, "max_tokens": 16, "seed": 5}),
        (PROMPTS[2], {**GREEDY, "max_tokens": 12}),
        (ids(29, 12), {**SAMPLED, "max_tokens": 24, "seed": 6, "repetition_penalty": 1.2}),
        (ids(31, 200), {**SAMPLED, "max_tokens": 14, "seed": 7}),
    ],
    "demo": [
        ("def read(self):\n", {**GREEDY, "max_tokens": 20}),
        ("import os\n\nclass ", {**SAMPLED, "max_tokens": 16, "seed": 5}),
        ("", {**GREEDY, "max_tokens": 12}),
        ("for name in ", {**SAMPLED, "max_tokens": 24, "seed": 6, "repetition_penalty": 1.2}),
        ("", {**SAMPLED, "max_tokens": 14, "seed": 7}),
    ],
}


def numbers(text: str) -> list[int]:
    """Read "3", "0-49" or "3,8-11"."""
    spans = [part.partition("-") for part in text.split(",") if part]
    return [seed for first, dash, last in spans for seed in range(int(first), int(last if dash else first) + 1)]


SEEDS = numbers(os.environ.get("MANYHANDS_CHURN_SEEDS", "0-49"))
# By cluster, so that each is started once.
SCENARIOS = sorted(
    [scenario_of(seed) for seed in SEEDS],
    key=lambda one: (MODELS.index(one.model), PLANS.index(one.plan), one.seed),
)


class Stage:
    """The cluster of the moment, and what each model answers when nothing goes wrong."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nursery, self._wires = Nursery(), Wires()
        self._folders: dict[str, Path] = {"demo": DEMO_MODEL}
        self._expected: dict[str, list[Answer]] = {}
        self._house: ChurnHouse | None = None
        self._now: tuple[str, str] = ("", "")
        self._num_houses = 0

    def checkpoint(self) -> Checkpoint:
        """Make the random model."""
        made = make_checkpoint(self._folder / "model", "llama3", num_hidden_layers=12, initializer_range=0.3)
        self._folders["random"] = made.folder
        return made

    def house(self, model: str, plan: str) -> ChurnHouse:
        """Return a whole cluster of this plan and model, the last one where it is such; undisturbed, plans agree."""
        if self._house is None or self._now != (model, plan):
            self.clear()
            if model not in self._folders:
                self.checkpoint()
            folder = self._folder / str(self._num_houses)
            self._num_houses += 1
            folder.mkdir()
            self._house = ChurnHouse(
                folder, self._folders[model], plan, self._nursery, self._wires, prefill_chunk=CHUNK, probation_s="0"
            )
            self._now = (model, plan)
            calm = [self._house.client.generate(prompt, **options) for prompt, options in ORDERS[model]]
            answers = [Answer(done.token_ids, done.text) for done in calm]
            assert self._expected.setdefault(model, answers) == answers, "the plan matters"
            self._house.until_whole()
        return self._house

    def expected(self, scenario: Scenario) -> list[Answer]:
        """What the streams of a scenario bring when nothing goes wrong."""
        return [self._expected[scenario.model][order] for order in scenario.orders]

    def clear(self) -> None:
        """End the cluster, and see that nothing of it is left."""
        house, self._house = self._house, None
        if house is not None:
            house.close()
            assert not self._nursery.living()
            assert not house.leftovers()

    def close(self) -> None:
        """End everything."""
        try:
            self.clear()
        finally:
            self._nursery.close()
            self._wires.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    ORDERS["demo"][2] = (SOURCE.read_text()[:1500], ORDERS["demo"][2][1])
    ORDERS["demo"][4] = (SOURCE.read_text()[2000:3000], ORDERS["demo"][4][1])
    running = Stage(tmp_path_factory.mktemp("churn"))
    try:
        yield running
    finally:
        running.close()


def test_no_greedy_choice_is_so_close_that_equality_would_be_luck(stage: Stage) -> None:
    random = stage.checkpoint()
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    demo = Checkpoint(folder=DEMO_MODEL, model=transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL).float())
    for order in (0, 2):
        for name, checkpoint in (("random", random), ("demo", demo)):
            prompt, options = ORDERS[name][order]
            prompt_ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
            assert len(checkpoint.tokens(prompt_ids, options["max_tokens"])) == options["max_tokens"]


def test_trouble_comes_while_the_first_stream_runs_however_fast_it_is() -> None:
    assert min(options["max_tokens"] for orders in ORDERS.values() for _, options in orders) == FEWEST_TOKENS
    for trouble in (scenario_of(seed).troubles[0] for seed in range(500)):
        assert trouble.last_tokens < FEWEST_TOKENS or trouble.moment is Moment.LOAD


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: f"seed-{one.seed}")
def test_every_stream_goes_on_with_the_same_tokens(stage: Stage, scenario: Scenario) -> None:
    house = stage.house(scenario.model, scenario.plan)
    print(scenario)
    run = Run(house, scenario, ORDERS[scenario.model])
    try:
        assert asyncio.run(run.answers()) == stage.expected(scenario)
        assert run.befell or scenario.first_loss  # a short stream may be over before a later moment
        house.until_whole()
        assert not house.leftovers()
    except BaseException:
        print(house.logs())
        stage.clear()  # the next scenario gets a cluster that this one has not spoiled
        raise
