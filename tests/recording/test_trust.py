"""A run's folder from somebody else: it names no server that gets our password, and no file that is not its own."""

import json
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from mlflow.tracking import MlflowClient

from lte_lightning.bench.keeping import begin_mlflow
from lte_lightning.errors import UserError
from lte_lightning.recording.recorder import Recorder
from lte_lightning.recording.unsent import UNSENT, keep, read, sync
from lte_lightning.report.tracked import collect_tracked
from lte_lightning.store import named_by_file, shown
from lte_lightning.sweep.tracking import Tracker


@pytest.fixture
def server(request):
    """A server that notes what it is sent and refuses it: its address, and the list of requests."""
    asked, status = [], getattr(request, "param", 403)

    class Notes(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(200 if self.path == "/health" else status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Notes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path):
    """`run(**about)`: the folder of a run of somebody else."""

    def make(**about):
        folder = tmp_path / "runs" / "lte" / "ab"
        folder.mkdir(parents=True)
        about = {"layout": 1, "name": None, "experiment": "lte", "run_id": "ab", "tracking_uri": None} | about
        (folder / "run.json").write_text(json.dumps(about))
        return folder

    return make


def resume(folder):
    recorder = Recorder()
    recorder.resume(str(folder / "checkpoints" / "last.ckpt"))
    return recorder


@pytest.mark.parametrize("own", [None, "http://mine.invalid:5000", "http://127.0.0.1:1", "https://127.0.0.1:{port}"])
@pytest.mark.parametrize("name", ["PASSWORD", "TOKEN", "AUTH"])
def test_credentials_stay_where_they_belong(own, name, run, server, monkeypatch):
    address, asked = server
    monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "SECRET")
    if own:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", own.format(port=address.rpartition(":")[2]))
    folder = run(tracking_uri=address)
    (folder / UNSENT).write_text('{"time": 1, "metrics": {"loss": 1.0}}\n')
    for contact in (lambda: resume(folder).make_logger(), lambda: sync(folder)):
        with pytest.raises(
            UserError, match=rf"run\.json names MLflow's store {address}, .* MLFLOW_TRACKING_{name}; if"
        ):
            contact()
    assert asked == []


@pytest.mark.parametrize("entry", ["default", "machine 127.0.0.1"])
def test_the_netrc_of_the_user_is_for_servers_that_the_user_names(entry, run, server, tmp_path, monkeypatch):
    address, asked = server
    (tmp_path / "netrc").write_text(f"{entry} login me password SECRET\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    folder = run(tracking_uri=address)
    (folder / UNSENT).write_text('{"time": 1, "metrics": {"loss": 1.0}}\n')
    with pytest.raises(UserError, match=r"which would be sent .*netrc; if you trust it"):
        sync(folder)
    assert asked == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(UserError, match="refuses"):
        sync(folder)
    assert "Basic bWU6U0VDUkVU" in {given for _, given in asked}


def test_the_password_file_of_postgresql_is_for_databases_that_the_user_names(run, tmp_path, monkeypatch):
    (tmp_path / "pgpass").write_text("*:*:*:*:SECRET\n")
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pgpass"))
    folder = run(tracking_uri="postgresql://127.0.0.1:9/mlflow")
    (folder / UNSENT).write_text('{"time": 1, "metrics": {"loss": 1.0}}\n')
    with pytest.raises(UserError, match=r"which would be sent .*pgpass; if you trust it"):
        sync(folder)


def test_the_host_that_the_user_names_gets_them(run, server, monkeypatch):
    address, asked = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "SECRET")
    with pytest.raises(UserError, match="refuses") as refused:
        resume(run(tracking_uri=address)).make_logger()
    assert "SECRET" not in str(refused.value)
    assert {given for path, given in asked if path != "/health"} == {"Basic bWU6U0VDUkVU"}
    assert [given for path, given in asked if path == "/health"] == [None]


def test_without_credentials_a_run_goes_on_where_it_was(run, server):
    address, asked = server
    with pytest.raises(UserError, match="refuses"):
        resume(run(tracking_uri=address)).make_logger()
    assert {given for _, given in asked} == {None}


@pytest.mark.parametrize(
    ("uri", "own", "used"),
    [
        (None, "http://mine:5000", "http://mine:5000"),
        ("https://***@host/mlflow", "https://me:SECRET@host/mlflow", "https://me:SECRET@host/mlflow"),
        ("sqlite:////there.db", "http://mine:5000", "sqlite:////there.db"),
        ("http://mine:5000/other", "http://mine:5000", "http://mine:5000/other"),
    ],
)
def test_which_store_is_used(uri, own, used, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "SECRET")
    assert named_by_file(uri, own, tmp_path / "run.json") == used


@pytest.mark.parametrize(
    "uri",
    [
        r"http://evil:80\@mine:5000/",  # its host is mine for urllib, and evil for requests
        "http://evil\t@mine:5000",
        "http://mine:5000 ",
        "http://mine:99999",
        "http://[mine:5000",
    ],
)
def test_a_host_that_not_all_libraries_read_alike_gets_none(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "SECRET")
    with pytest.raises(UserError, match=r"which would be sent MLFLOW_TRACKING_TOKEN"):
        named_by_file(uri, "http://mine:5000", tmp_path / "run.json")


@pytest.mark.parametrize("server", [500], indirect=True)
@pytest.mark.parametrize(
    "address", ["http://me:SECRET@{host}", "http://{host}/?token=SECRET", "ftp://me:SECRET@{host}"]
)
def test_no_traceback_shows_a_password(address, server, run, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    address = address.format(host=server[0].removeprefix("http://"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    folder = run(tracking_uri=shown(address))
    (folder / UNSENT).write_text('{"time": 1, "metrics": {"loss": 1.0}}\n')
    sweep = SimpleNamespace(about={}, path=folder.parent)
    for contact in (
        lambda: sync(folder),
        lambda: collect_tracked(None, experiment="lte"),
        lambda: Tracker(sweep),
        lambda: begin_mlflow("lte"),
    ):
        with pytest.raises(UserError) as refused:
            contact()
        shown_lines = [line for line in traceback.format_exception(refused.value) if __file__ not in line]
        assert "SECRET" not in "".join(shown_lines)


@pytest.mark.parametrize("experiment", ["../../outside", "/{folder}/outside", "a/../../../outside"])
def test_an_experiment_s_name_leads_nowhere(experiment, run, tmp_path):
    folder = run(experiment=experiment.format(folder=tmp_path))
    before = sorted(tmp_path.rglob("*"))
    recorder = resume(folder)
    assert recorder.place == folder.parent
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "about", [{"experiment": 3}, {"run_id": ["ab"]}, {"tracking_uri": {"a": 1}}, {"name": 1.5}, {"layout": {}}]
)
def test_names_that_are_none(about, run):
    with pytest.raises(UserError, match=r"run\.json is damaged|has layout"):
        resume(run(**about))


@pytest.mark.timeout(300)  # MLflow makes its tables in dozens of steps
def test_files_that_wait_are_those_of_the_run(run, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private.txt").write_text("mine")
    folder = run(run_id=None, experiment=tmp_path.name)
    (folder / "link.txt").symlink_to(tmp_path / "private.txt")
    for name in ("../../../private.txt", str(tmp_path / "private.txt"), "link.txt"):
        (folder / UNSENT).write_text(json.dumps({"time": 1, "file": name}) + "\n")
        with pytest.raises(UserError, match=r"names .*, which is not in the run's folder; remove that line"):
            sync(folder)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (identity,) = [json.loads((folder / "run.json").read_text())["run_id"]]
    assert client.list_artifacts(identity) == []

    # A database that came along points to a folder of ours, or to a server
    home, root = (tmp_path / "home").as_uri(), folder.parent.parent.as_uri()
    for place in (home, f"{root}/../home", "../home", f"{server[0]}/home"):
        experiment = client.create_experiment(f"theirs {place}", artifact_location=place)
        theirs = client.create_run(experiment).info.run_id
        about = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(about | {"run_id": theirs, "experiment": "other"}))
        (folder / "results.json").write_text("{}")
        (folder / UNSENT).write_text(json.dumps({"time": 1, "file": "results.json"}) + "\n")
        assert sync(folder) == 1
        assert not list(tmp_path.parent.glob("**/home"))
        assert server[1] == []
        assert json.loads((folder / "run.json").read_text())["run_id"] != theirs


@pytest.mark.parametrize("line", ["no json", "[1]", '{"time": 1,', "[" * 100_000, "\x00"])
def test_a_damaged_line_is_named(line, run):
    folder = run()
    (folder / UNSENT).write_text(f"{line}\n")
    with pytest.raises(UserError, match=rf"{UNSENT}, line 1, is damaged"):
        sync(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The address of the user's database: to make one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


WAITING = [
    {"tags": 1},
    {"metrics": {"loss": 1.0}},
    {"time": "noon", "metrics": {"loss": 1.0}},
    {"time": float("inf"), "metrics": {"loss": 1.0}},
    {"time": 1, "metrics": {"loss": None}},
    {"data": {"name": "rows"}},
    {"file": 1},
    {"file": "\ud800"},
    {"file": "run.json", "to": ["figures"]},
    {"model": {"folder": "/"}},
    {"model": 1},
    {"status": "GONE"},
    {"params": {"a\nb": "1"}},
]


@pytest.mark.parametrize("entry", WAITING, ids=str)
def test_an_entry_that_cannot_be_sent_is_named(entry, run, store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    folder = run(run_id=None, experiment=tmp_path.name)
    folder.joinpath("config.yaml").write_text("one: 1")
    (folder / UNSENT).write_text("".join(json.dumps(line) + "\n" for line in ({"tags": {"a": "b"}}, entry)))
    with pytest.raises(UserError, match=r"unsent.jsonl(, line 2, cannot be sent| names).*; remove (the|that) line"):
        sync(folder)
    assert len((folder / UNSENT).read_text().splitlines()) == 2


@pytest.mark.parametrize("begin", [3, [], {"tags": 3}, {"tags": {"a": 1}}])
def test_a_run_that_begins_with_no_tags(begin, run, store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    folder = run(run_id=None, experiment=tmp_path.name)
    (folder / UNSENT).write_text(json.dumps({"begin": begin}) + "\n")
    with pytest.raises(UserError, match="is damaged: its run begins with"):
        sync(folder)


@pytest.mark.parametrize("torn", ["", '{"time": 1, "tags": {"a', '{"time": 1, "tags": {}}'])
def test_what_is_kept_after_a_kill_does_not_join_a_line_that_was_cut_short(torn, tmp_path):
    keep(tmp_path, [{"metrics": {"loss": 1.0}}])
    with (tmp_path / UNSENT).open("a") as file:
        file.write(torn)
    keep(tmp_path, [{"metrics": {"loss": 2.0}}, {"metrics": {"loss": 3.0}}])
    assert [entry["metrics"]["loss"] for entry in read(tmp_path)] == [1.0, 2.0, 3.0]


def test_a_full_disk_leaves_whole_lines(no_file_larger_than, tmp_path):
    keep(tmp_path, [{"metrics": {"loss": 1.0}}])
    with pytest.raises(UserError, match=r"cannot write .*unsent\.jsonl: File too large"), no_file_larger_than(70):
        keep(tmp_path, [{"metrics": {"loss": 2.0}}, {"metrics": {"loss": 3.0}}])
    keep(tmp_path, [{"metrics": {"loss": 4.0}}])
    assert [entry["metrics"]["loss"] for entry in read(tmp_path)] == [1.0, 2.0, 4.0]


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"is no run's folder: it has no run\.json"):
        sync(tmp_path)
