"""The figure of a sweep of latent sizes."""

import pathlib

import pytest

from svae_jax.errors import UserError

pytest.importorskip("pandas")
from experiments.results import sizes

HEADER = "status,posterior,d,N,C,eval/elbo,eval/kl,eval/reconstruction"


def write(path, *rows, header=HEADER):
    path.write_text("\n".join([header, *rows]))
    return path


def test_lines_join_the_sizes_of_a_posterior(tmp_path):
    path = write(
        tmp_path / "sweep.csv",
        "done,mvn,3,8,,5,2,7",
        "done,mvn,3,4,,4,1,5",
        "done,mvn,2,4,,1,1,2",
        "failed,mvn,2,8,,,,",
        "done,mvn,3,8,,nan,nan,nan",  # it diverged
        "done,vector,,8,10,-3,1,-2",
        "done,vector,,4,10,-1,1,0",  # as many latents, another decoder: the better one is shown
    )
    models = sizes.read(path)
    found = models[["line", "latents", "elbo", "rate", "distortion"]].to_dict("split")["data"]
    assert found == [
        ["mvn, 2x2", 16, 1, 1, -2],
        ["mvn, 3x3", 36, 4, 1, -5],
        ["mvn, 3x3", 72, 5, 2, -7],
        ["vector, 1x1", 10, -1, 1, 0],
    ]
    left, right = sizes.figure(models).axes
    drawn = {line.get_label(): line for line in (*right.get_lines(), *left.get_lines())}
    assert drawn["mvn, 3x3"].get_xydata().tolist() == [[36, 4], [72, 5]]
    rates = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in right.get_lines()}
    assert rates[1, 2] == (-5, -7)


def test_grey_lines_join_places_of_equal_elbo(tmp_path):
    path = write(tmp_path / "sweep.csv", "done,mvn,3,8,,100,20,120", "done,mvn,3,4,,40,10,50")
    _, right = sizes.figure(sizes.read(path)).axes
    grey = [line for line in right.get_lines() if line.get_color() == "0.9"]
    assert len(grey) > 3
    for line in grey:
        assert sum(line.get_xydata()[0]) == pytest.approx(sum(line.get_xydata()[1]))
    assert right.get_xlim()[1] < 25  # they do not widen the axes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("status,posterior\ndone,mvn", "not of a sweep of d, N and C"),
        (f"{HEADER}\nfailed,mvn,3,8,,,,", "no finished trial"),
        (None, "cannot be read"),
    ],
)
def test_mistakes_are_told(content, message, tmp_path):
    path = tmp_path / "sweep.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        sizes.main([f"--sweep={path}", f"--out={tmp_path / 'x.png'}"])


def test_the_command_writes_a_picture(tmp_path):
    path = write(tmp_path / "sweep.csv", "done,mvn,3,8,,5,2,7", "done,mvn,3,4,,4,1,5")
    out = tmp_path / "sizes.png"
    sizes.main([f"--sweep={path}", f"--out={out}"])
    assert pathlib.Path(out).read_bytes().startswith(b"\x89PNG")
