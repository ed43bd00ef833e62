"""What a container may use of the machine's cores."""

import pytest

from engines import machine
from engines.onnxruntime import threads


def make(root, cgroup, **files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3.0),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "200000 100000\n"}, 2.0),
        (
            "4:cpu,cpuacct:/x\n1:name=systemd:/x\n",
            {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        (
            "4:cpuacct,cpu:/x\n",
            {"cpuacct,cpu/x/cpu.cfs_quota_us": "400000\n", "cpuacct,cpu/x/cpu.cfs_period_us": "100000\n"},
            4.0,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("7:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("nonsense\n", {"cpu.max": "100000 100000\n"}, None),
        ("0::/\n", {"cpu.max": "nonsense\n"}, None),
    ],
)
def test_the_least_of_all_groups_is_the_quota(tmp_path, cgroup, files, cores):
    assert machine.cpu_quota(make(tmp_path, cgroup, **files)) == cores


def test_no_control_groups(tmp_path):
    assert machine.cpu_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "usable"), [(None, 8), (2.9, 2), (0.5, 1), (16.0, 8)])
def test_threads_are_no_more_than_the_quota(monkeypatch, quota, usable):
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    assert machine.usable_cores() == usable
    assert threads.bound_cores() == (usable if usable < 8 else 0)
