"""Is it the same whoever fuses a cohort, and whoever dies? ``sharded_fusion.py [FOLDER]``.

Trains the smoke experiment for seconds, fuses 12 generated heads by 1, 2 and 4 workers at once,
then by one that is killed halfway and two that follow, and compares everything byte for byte.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CASES = 12
SMOKE = ("experiment=smoke", f"phantoms.cases={CASES}", "data.prepare.workers=1", "logger=csv")


def main(folder: Path) -> None:
    run, studies = folder / "run", folder / "studies"
    if not (run / "run.json").is_file():
        call("train", *SMOKE, f"cache_dir={folder / 'cache'}", f"hydra.run.dir={run}", "test=false")
        (made,) = (folder / "cache").glob("phantoms_*")
        for case in sorted(made.glob("case_*")):
            shutil.copytree(case, studies / case.name)

    def workers(out: Path, count: int) -> list[subprocess.Popen[bytes]]:
        command = [
            sys.executable, "-m", "clinfuse.fuse", f"run={run}", f"studies={studies}", f"out={out}",
            f"cache_dir={folder / 'cache'}", f"hydra.run.dir={folder / 'hydra'}",
        ]  # fmt: skip
        return [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(count)]

    made: dict[str, dict[str, bytes]] = {}
    print("| workers | seconds | cases | files | bytes | as one worker's |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for count in (1, 2, 4):
        out, began = folder / f"by_{count}", time.monotonic()
        shutil.rmtree(out, ignore_errors=True)
        assert [worker.wait() for worker in workers(out, count)] == [0] * count
        made[str(count)] = contents(out)
        report(str(count), time.monotonic() - began, made)

    out, began = folder / "killed", time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    (worker,) = workers(out, 1)
    while len(done(out)) < CASES // 2:
        assert worker.poll() is None
        time.sleep(0.002)
    worker.kill()
    worker.wait()
    before = {path: path.stat().st_mtime_ns for case in done(out) for path in case.iterdir()}
    begun = [path.name for path in (out / ".work").iterdir() if path.is_dir()]
    print(
        f"\nkilled by SIGKILL with {len(done(out))} of {CASES} cases done, {begun} begun",
        flush=True,
    )
    assert [worker.wait() for worker in workers(out, 2)] == [0, 0]
    made["killed, then 2"] = contents(out)
    untouched = sum(path.stat().st_mtime_ns == then for path, then in before.items())
    print(f"{untouched} of {len(before)} files of before untouched\n")
    report("killed, then 2", time.monotonic() - began, made)
    same = all(other == made["1"] for other in made.values())
    sys.exit(0 if same and untouched == len(before) else 1)


def call(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"clinfuse.{module}", *arguments], check=True)


def done(out: Path) -> list[Path]:
    return sorted(out.glob("case_*"))


def contents(out: Path) -> dict[str, bytes]:
    """All files but those that workers keep for themselves; the table without the folder's name."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and not {".work", "fusion.json"} & {*path.parts}:
            name = os.path.relpath(path, out)
            found[name] = path.read_bytes().replace(f"{out}/".encode(), b"")
    return found


def report(name: str, seconds: float, made: dict[str, dict[str, bytes]]) -> None:
    files = made[name]
    cases = len({file.split("/")[0] for file in files if file.startswith("case_")})
    size = sum(map(len, files.values()))
    same = "the same" if files == made["1"] else "not the same"
    print(f"| {name} | {seconds:.0f} | {cases} | {len(files)} | {size} | {same} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sharded_fusion").resolve())
