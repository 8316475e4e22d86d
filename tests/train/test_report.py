"""Metrics sent to a service: each line once, in one run after restarts, and training that the service can't disturb."""

import json
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest
from small_run import outcome

from fastmim import __version__, cli
from fastmim.train import ConfigError, Interrupted, Trainer
from fastmim.train.report import sender as sending
from fastmim.train.report.reporter import Reporter, find_reporter
from fastmim.train.report.sender import Sender


class Recorder:
    """Stand-in for a service; each of its parts of a run notes what it was given."""

    parts: list["Recorder"] = []

    def __init__(self, config, run_id, *, project="none"):
        self.config, self.given, self.project = config, run_id, project
        self.run_id = run_id or "first"
        self.lines, self.ending = [], None
        Recorder.parts.append(self)

    def write(self, lines):
        self.lines += lines

    def close(self, ending):
        self.ending = ending


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    """Make the recorder a class that `report_to` can name."""
    module = ModuleType("stand_in")
    module.Recorder = Recorder
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setattr(Recorder, "parts", [])
    return {"report_to": "stand_in:Recorder", "report_options": {"project": "pretraining"}}


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(part):
    return [line["step"] for line in part.lines]


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_every_line_is_sent(config, tmp_path, recorder):
    settings = config(**recorder)
    Trainer(settings).run()
    (part,) = Recorder.parts
    assert part.lines == logged(tmp_path / "run") and len(part.lines) == 12
    assert (part.given, part.project, part.ending) == (None, "pretraining", "finished")
    assert part.config["fastmim_version"] == __version__ and part.config["model"] == settings.model
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == {"stand_in:Recorder": "first"}


def test_a_run_that_continues_is_the_same_run_there(config, tmp_path, recorder, monkeypatch):
    """Check a run that fails and repeats steps, is ended by a signal, and is finished."""
    update = Trainer._update

    def failing(self, batch):
        update(self, batch) if self.step < 7 else 1 / 0

    def signalled(self, batch):
        update(self, batch)
        self.signals.received = 15 if self.step == 10 else None

    for patch, error in ((failing, ZeroDivisionError), (signalled, Interrupted)):
        with monkeypatch.context() as patched, pytest.raises(error):
            patched.setattr(Trainer, "_update", patch)
            Trainer(config(**recorder)).run()
    Trainer(config(**recorder)).run()
    assert [steps(part) for part in Recorder.parts] == [[*range(1, 8)], [*range(5, 11)], [11, 12]]
    assert [part.given for part in Recorder.parts] == [None, "first", "first"]
    assert [part.ending for part in Recorder.parts] == ["failed", "interrupted", "finished"]
    # the later line of a step counts
    latest = {line["step"]: line for part in Recorder.parts for line in part.lines}
    assert [*latest.values()] == logged(tmp_path / "run")


def test_a_service_that_fails_changes_nothing(config, straight, tmp_path, recorder, monkeypatch, capsys):
    def write(self, lines):
        raise SystemExit("no network\nat all")

    monkeypatch.setattr(Recorder, "write", write)
    Trainer(config(**recorder)).run()
    assert outcome(tmp_path / "run") == outcome(straight)
    printed = capsys.readouterr().err
    assert printed.count("takes no metrics for now (SystemExit: no network at all); training goes on") == 1
    assert f"lacks 12 lines of metrics.jsonl; `fastmim report {tmp_path / 'run'} --to stand_in:Recorder`" in printed


def test_only_the_first_process_sends():
    processes = SimpleNamespace(first=False, gather=lambda problem: [problem])
    trainer = SimpleNamespace(processes=processes, config=SimpleNamespace(report_to="stand_in:Recorder"))
    trainer._raise_first = lambda problem: Trainer._raise_first(trainer, problem)
    assert Trainer._open_sender(trainer) is None


# ---- the thread ------------------------------------------------------------------------------------------------------


def make(run_id):
    return Recorder({}, run_id)


def test_lines_that_a_service_refused_are_sent_later(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sending, "RETRY", 0.01)
    failures, write = iter([True, True, False, True, False, False, False]), Recorder.write

    def failing(self, lines):
        if next(failures, False):
            raise OSError("busy")
        write(self, lines)

    monkeypatch.setattr(Recorder, "write", failing)
    sender = Sender("service", make, tmp_path)
    for step in range(5):
        sender.send({"step": step})
        time.sleep(0.02)
    sender.close("finished")
    (part,) = Recorder.parts
    assert steps(part) == [0, 1, 2, 3, 4] and part.ending == "finished"
    assert capsys.readouterr().err.count("busy") == 1


def test_a_service_that_hangs_is_left_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sending, "PATIENCE", 0.05)
    monkeypatch.setattr(sending, "WAITING", 4)
    over = threading.Event()
    monkeypatch.setattr(Recorder, "write", lambda self, lines: over.wait())
    sender = Sender("service", make, tmp_path)
    started = time.monotonic()
    for step in range(10):
        sender.send({"step": step})
    sender.close("failed")
    assert time.monotonic() - started < 5
    # those that wait and those that were given up
    assert "service lacks 10 lines" in capsys.readouterr().err and len(sender.waiting) == 4
    over.set()
    sender.thread.join(10)
    assert sender.ended and not sender.waiting and sender.passed == 10


def test_a_run_without_a_line_is_not_told(tmp_path):
    Sender("service", make, tmp_path).close("failed")
    assert not Recorder.parts and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("text", ["", "[1]", '{"service": 3}', '{"other": "theirs"}'])
def test_the_file_of_ids_may_be_damaged_and_holds_other_services(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    sender = Sender("service", make, tmp_path)
    sender.send({"step": 1})
    sender.close("finished")
    ids = json.loads((tmp_path / "report.json").read_text())
    assert Recorder.parts[0].given is None and ids.pop("service") == "first"
    assert ids == ({"other": "theirs"} if "other" in text else {})


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_metrics_of_a_run_that_is_there(straight, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastmim.train.report.resend.BATCH", 5)
    assert cli.main(["report", str(straight), "--to", "stand_in:Recorder", "--options", "project=later"]) == 0
    (part,) = Recorder.parts
    assert part.lines == logged(straight) and (part.given, part.project, part.ending) == (None, "later", "finished")
    assert part.config["output_dir"] == str(straight) and part.config["seed"] == 0
    assert "12 lines of metrics.jsonl sent to stand_in:Recorder as run first" in capsys.readouterr().out
    assert not (straight / "report.json").exists()


def test_the_settings_of_the_run_are_the_defaults(config, tmp_path, recorder):
    Trainer(config(**recorder)).run()
    (tmp_path / "run" / "final" / "run.json").unlink()
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    live, again = Recorder.parts
    assert (again.lines, again.project, again.ending) == (live.lines, "pretraining", "interrupted")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp_path}"], "whose metrics.jsonl has no line"),
        (["{straight}"], "--to is missing"),
        (["{straight}", "--to", "aim"], "report_to must be"),
        (
            ["{straight}", "--to", "stand_in:Recorder", "--options", "project"],
            "given as key=value, got 'project'",
        ),
        (["{straight}", "--to", "stand_in:Recorder", "--options", "colour=red"], "report_options of stand_in:Recorder"),
    ],
)
def test_wrong_arguments(straight, tmp_path, capsys, arguments, message):
    places = {"straight": straight, "tmp_path": tmp_path}
    assert cli.main(["report", *(argument.format(**places) for argument in arguments)]) == 1
    assert message in capsys.readouterr().err and not Recorder.parts


def test_a_service_that_fails_is_one_line(straight, capsys, monkeypatch):
    monkeypatch.setattr(Recorder, "close", lambda self, ending: 1 / 0)
    assert cli.main(["report", str(straight), "--to", "stand_in:Recorder"]) == 1
    assert "stand_in:Recorder after 12 lines: division by zero" in capsys.readouterr().err


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": "tensorboard"}, 'report_to must be "wandb", "mlflow" or "package.module:Class", got'),
        ({"report_options": {"project": "x"}}, "report_options must be empty without report_to"),
        ({"report_to": 3}, "report_to must be text"),
    ],
)
def test_wrong_settings(config, settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stand_in:Recorder", {"projekt": 1}, "report_options of stand_in:Recorder: .*'projekt'"),
        ("stand_in:Nothing", {}, "report_to stand_in:Nothing can't be imported"),
        ("wandb", {}, r"report_to wandb needs wandb: pip install 'fastmim\[wandb\]'"),
        ("mlflow", {}, r"report_to mlflow needs mlflow: pip install 'fastmim\[mlflow\]'"),
    ],
)
def test_a_service_that_is_not_there_is_an_error_before_the_first_step(config, monkeypatch, name, options, message):
    for package in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=message):
        Trainer(config(report_to=name, report_options=options)).run()


def test_the_base_says_what_is_missing():
    with pytest.raises(TypeError, match="Reporter must define __init__"):
        Reporter({}, None)
    assert find_reporter("stand_in:Recorder", {}) is Recorder


# ---- Weights & Biases and MLflow -------------------------------------------------------------------------------------


@pytest.fixture
def package(monkeypatch):
    """Return a function that installs a stand-in for a package and returns fastmim's reporter for it."""
    names = []

    def install(service, **modules):
        for name, content in modules.items():
            module = ModuleType(name.replace("_", "."))
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        names.append(f"fastmim.train.report.{service}_reporter")
        sys.modules.pop(names[-1], None)
        return find_reporter(service, {})

    yield install
    for name in names:
        sys.modules.pop(name, None)


LINES = [{"step": 4, "loss": 1.5, "grad_norm": None}, {"step": 5, "loss": 1.25, "grad_norm": 2.0}]


class WandbRun:
    def __init__(self, **options):
        self.options, self.id, self.calls = options, options["id"] or "made", []

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, *args, options))


@pytest.fixture
def wandb(package, monkeypatch):
    """Return the reporter for a stand-in of wandb, which someone is logged in to."""
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    content = {
        "init": lambda **options: WandbRun(**options),
        "setup": lambda: SimpleNamespace(settings=SimpleNamespace(mode="online")),
        "login": lambda prompt=True, verify=True: not prompt and not verify,
    }
    return package("wandb", wandb=content)


def test_wandb(wandb):
    reporter = wandb({"output_dir": "/runs/a", "seed": 1}, None, tags=["x"], settings={"console": "off"})
    run, options = reporter._run, reporter._run.options
    assert (options["project"], options["name"], options["dir"], options["id"]) == ("fastmim", "a", "/runs/a", None)
    assert options["config"] == {"output_dir": "/runs/a", "seed": 1} and options["resume"] == "allow"
    patience = dict.fromkeys(("init_timeout", "finish_timeout"), sending.PATIENCE)
    assert options["settings"] == {**patience, "console": "off"} and options["tags"] == ["x"]
    reporter.write(LINES)
    assert run.calls == [
        ("define_metric", "step", {"hidden": True}),
        # wandb's own step can't go back
        ("define_metric", "*", {"step_metric": "step"}),
        ("log", {"step": 4, "loss": 1.5}, {}),
        ("log", {"step": 5, "loss": 1.25, "grad_norm": 2.0}, {}),
    ]
    del run.calls[:]
    reporter.close("finished")
    assert run.calls == [("finish", {"exit_code": 0})]
    again = wandb({"output_dir": "/runs/a"}, reporter.run_id, project="p", name="n")
    options = again._run.options
    assert (again.run_id, options["project"], options["name"], options["id"]) == ("made", "p", "n", "made")
    del again._run.calls[:]
    again.close("interrupted")
    assert again._run.calls == [("mark_preempting", {}), ("finish", {"exit_code": 1})]


def test_wandb_never_asks_for_a_key(wandb):
    sys.modules["wandb"].login = lambda prompt=True, verify=True: prompt
    with pytest.raises(RuntimeError, match="not logged in: call `wandb login`"):
        wandb({"output_dir": "/runs/a"}, None)
    assert wandb({"output_dir": "/runs/a"}, None, mode="offline").run_id == "made"
    # before version 0.30
    sys.modules["wandb"].login = lambda: True
    sys.modules["wandb"].api = SimpleNamespace(api_key=None)
    with pytest.raises(RuntimeError, match="not logged in"):
        wandb({"output_dir": "/runs/a"}, None)
    sys.modules["wandb"].api.api_key = "key"
    assert wandb({"output_dir": "/runs/a"}, None).run_id == "made"


class Store:
    """Stand-in for MlflowClient with one experiment and its runs."""

    def __init__(self, uri):
        self.uri, self.experiments, self.runs = uri, {}, {}

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name):
        self.experiments[name] = SimpleNamespace(experiment_id="7")
        return "7"

    def create_run(self, experiment, run_name):
        info = SimpleNamespace(run_id=f"run-{len(self.runs)}", lifecycle_stage="active", status="RUNNING")
        data = SimpleNamespace(params={}, tags={}, metrics=[], name=run_name, experiment=experiment)
        return self.runs.setdefault(info.run_id, SimpleNamespace(info=info, data=data))

    def get_run(self, run_id):
        if run_id not in self.runs:
            raise MlflowException("RESOURCE_DOES_NOT_EXIST")
        return self.runs[run_id]

    def update_run(self, run_id, status):
        self.runs[run_id].info.status = status

    set_terminated = update_run

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        assert len(metrics) <= 1000 and len(params) <= 100 and len(tags) <= 100
        data = self.runs[run_id].data
        for key, value in params:
            assert data.params.setdefault(key, value) == value and len(value) <= 500, "params can't change"
        data.tags |= dict(tags)
        data.metrics += metrics


class MlflowException(Exception):
    def __init__(self, code):
        self.error_code = code


@pytest.fixture
def mlflow(package, monkeypatch):
    """Return the reporter for a stand-in of mlflow, and its store."""
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    store = Store(None)
    entities = {name: lambda *values: values for name in ("Metric", "Param", "RunTag")}
    reporter = package(
        "mlflow",
        mlflow={"MlflowClient": lambda uri: store},
        mlflow_entities=entities,
        mlflow_exceptions={"MlflowException": MlflowException},
    )
    return reporter, store


def test_mlflow(mlflow):
    reporter, store = mlflow
    config = {
        "output_dir": "/runs/a",
        "base_lr": 0.1,
        "model_options": {"depth": 2},
        "data_options": {},
        "long": "x" * 999,
    }
    part = reporter(config, None)
    part.write(LINES)
    part.close("interrupted")
    run = store.runs["run-0"]
    assert (run.info.status, run.data.name, run.data.experiment) == ("KILLED", "a", "7")
    assert run.data.params == {
        "output_dir": "/runs/a", "base_lr": "0.1", "model_options.depth": "2", "data_options": "{}", "long": "x" * 500
    }  # fmt: skip
    assert [(key, value, step) for key, value, _, step in run.data.metrics] == [
        ("loss", 1.5, 4),
        ("loss", 1.25, 5),
        ("grad_norm", 2.0, 5),
    ]
    part = reporter({**config, "base_lr": 0.2, "ema": 0.9}, part.run_id, tags={"team": "b"})
    assert part.run_id == "run-0" and run.info.status == "RUNNING" and run.data.params["ema"] == "0.9"
    assert run.data.params["base_lr"] == "0.1" and run.data.tags == {"base_lr": "0.2", "team": "b"}
    part.close("finished")
    assert run.info.status == "FINISHED"


def test_mlflow_takes_many_params_and_metrics(mlflow):
    reporter, store = mlflow
    part = reporter({"output_dir": "a", **{f"key{n}": n for n in range(250)}}, None)
    part.write([{"step": step, **{f"m{n}": 0.0 for n in range(30)}} for step in range(100)])
    data = store.runs[part.run_id].data
    assert len(data.params) == 251 and len(data.metrics) == 3000


def test_mlflow_starts_a_new_run_where_the_old_one_is_gone(mlflow):
    reporter, store = mlflow
    assert reporter({"output_dir": "a"}, "deleted").run_id == "run-0"
    store.runs["run-0"].info.lifecycle_stage = "deleted"
    assert reporter({"output_dir": "a"}, "run-0", experiment_name="fastmim").run_id == "run-1"
