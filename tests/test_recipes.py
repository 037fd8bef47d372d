"""Every recipe parses through the real settings, and says of its memory what the planner says."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from longlora import cli
from longlora.demo import recipe as demo_recipe
from longlora.errors import REQUEUE
from longlora.planner.fitting import Fit
from longlora.planner.memory import host_bytes
from longlora.planner.reading import read_anatomy
from longlora.planner.shapes import find_config
from longlora.settings import ExtendSettings, PlanSettings, SftSettings
from longlora.training.common import flat

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
PLANNED_AS = {
    # what the planner knows by another name: instruction models have their base's shape
    "meta-llama/Llama-2-7b-chat-hf": "llama2-7b",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m",
}
ONLY_SFT = ("prompt_format", "epochs", "held_out")
PLAN = r"^# plan: \S+ GB a GPU(?: and \S+ GB of the host's)?(?: with (?P<flags>.+))?$"


def command(file: Path) -> str:
    return "sft" if file.name.startswith("sft-") else "extend"


def words(file: Path) -> list[str]:
    """The command line of the recipe; one that leaves the documents to the reader gets some."""
    given = [] if "data" in yaml.safe_load(file.read_text()) else ["--data", "FILE"]
    return [command(file), "--config", str(file), "--output", "RUN", *given]


def test_there_are_recipes_for_the_papers_runs_and_for_those_with_less():
    names = {file.stem for file in RECIPES}
    assert names >= {
        "llama2-7b-32k",
        "llama2-7b-100k",
        "llama2-13b-64k",
        "llama2-70b-32k",
        "llama3.1-8b",
        "qwen3-8b",
        "smollm2-135m-16k",
        "smollm2-135m-32k",
        "tiny-demo",
        "sft-llama2-7b-16k",
        "sft-smollm2-135m-32k",
    }


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_settings_and_nothing_else(file):
    name, settings = cli.parse(words(file))
    assert name == command(file)
    assert isinstance(settings, SftSettings if name == "sft" else ExtendSettings)
    values = yaml.safe_load(file.read_text())
    found = flat(settings)
    for key, value in values.items():
        if key != "model":
            given = list(found[key]) if isinstance(found[key], tuple) else found[key]
            assert given == value, key


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipes_memory_is_what_the_planner_says(file, tmp_path):
    said = re.search(PLAN, file.read_text(), re.MULTILINE)
    assert said, "its comment has no line `# plan: N GB a GPU with FLAGS`"
    settings = planned(file, tmp_path, (said["flags"] or "").split())
    anatomy = read_anatomy(find_config(settings.model, settings.loading), settings.trainable)
    fit, context = Fit(anatomy, settings), settings.positions.context
    assert fit.fits(context, fit.given())
    on_host = host_bytes(anatomy, fit.step(context, fit.given()))
    line = f"# plan: {fit.peak_bytes(context, fit.given()) / 1e9:.1f} GB a GPU"
    line += f" and {on_host / 1e9:.1f} GB of the host's" if on_host else ""
    line += f" with {said['flags']}" if said["flags"] else ""
    assert said[0] == line


def planned(file: Path, folder: Path, flags: list[str]) -> PlanSettings:
    """What `longlora plan --config FILE FLAGS` is asked, without what fine-tuning alone knows."""
    values = {name: value for name, value in yaml.safe_load(file.read_text()).items() if name not in ONLY_SFT}
    values["model"] = PLANNED_AS.get(values["model"], values["model"])
    recipe = folder / "plan.yaml"
    recipe.write_text(yaml.safe_dump(values))
    settings = cli.parse(["plan", "--config", str(recipe), *flags])[1]
    assert isinstance(settings, PlanSettings)
    return settings


def test_the_tiny_recipe_is_the_demos():
    _, settings = cli.parse(words(next(file for file in RECIPES if file.stem == "tiny-demo")))
    ours, theirs = flat(settings), flat(demo_recipe("RUN", 0))
    assert {name for name in theirs if ours[name] != theirs[name]} <= {"contexts", "save_every", "dtype"}


@pytest.mark.parametrize(("name", "engine"), [("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")])
def test_accelerate_reads_its_config_files(name, engine):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(Path(__file__).parents[1] / "recipes" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == engine
    assert config.num_processes == 8
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    else:
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_the_slurm_example_is_a_script():
    script = Path(__file__).parents[1] / "recipes" / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert f'"$status" -eq {REQUEUE}' in script.read_text()
