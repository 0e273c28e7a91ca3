"""Test the input of download.sh: the link, the models and the folder, from options, the environment or standard input."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.fault_server import (
    CHECKLIST,
    FILES,
    SCRIPT,
    SECRET,
    SHARD,
    Downloader,
    files_of,
)


def test_an_empty_list_of_models_downloads_all_models(downloader: Downloader) -> None:
    assert downloader.run("--dir", str(downloader.target), stdin=f"{downloader.url}\n\n")[0] == 0
    assert downloader.files() == FILES


def test_the_star_in_the_link_is_replaced_by_the_path_of_each_file(download: Downloader) -> None:
    download.run()
    paths, queries = zip(*((request.path, request.query) for request in download.server.requests), strict=True)
    assert sorted(paths) == sorted(files_of("7B")) and paths.index(CHECKLIST) < paths.index(SHARD)
    assert set(queries) == {download.url.partition("?")[2]}


def test_a_link_copied_from_html_is_mended(downloader: Downloader) -> None:
    downloader.succeeds("--url", downloader.url.replace("&", "&amp;"), "--models", "7B", "--dir", str(downloader.target))
    assert {request.query for request in downloader.server.requests} == {downloader.url.partition("?")[2]}


@pytest.mark.parametrize("query", ["", "?token={}", "?AWSAccessKeyId=K&Expires=9&Signature={}"])
def test_a_link_of_a_mirror_may_have_any_parts(downloader: Downloader, query: str) -> None:
    url = f"{downloader.server.address}/*{query.format(SECRET)}"
    downloader.succeeds("--url", url, "--models", "7B", "--dir", str(downloader.target))


@pytest.mark.parametrize("source", ["option", "option with =", "environment"])
def test_a_tilde_in_the_folder_stands_for_the_home_folder(downloader: Downloader, source: str) -> None:
    """A shell does not replace ~ in quotes or after =."""
    downloader.target = downloader.home / "weights"
    options = {"option": ["--dir", "~/weights"], "option with =": ["--dir=~/weights"], "environment": []}[source]
    env = {"TARGET_FOLDER": "~/weights"} if source == "environment" else {}
    downloader.succeeds("--url", downloader.url, "--models", "7B", *options, env=env)


def test_a_tilde_for_another_users_home_folder_is_refused(downloader: Downloader) -> None:
    reason = downloader.fails("--url", downloader.url, "--models", "7B", "--dir", "~nobody/weights")
    assert "the folder '~nobody/weights' begins with ~" in reason and not downloader.server.requests


@pytest.mark.parametrize("answers", ["{}\n7B\n", "{}\n7B", " {}\r\n 7B\r\n"])
def test_link_and_models_are_read_from_stdin(downloader: Downloader, answers: str) -> None:
    """Without --dir the files are written to the current folder."""
    downloader.target.mkdir()
    downloader.options.clear()
    downloader.succeeds(stdin=answers.format(downloader.url), cwd=downloader.target)


def test_environment_variables_replace_options_and_options_override_them(downloader: Downloader) -> None:
    options, downloader.options = [f"--url={downloader.url}", "--models=7B", f"--dir={downloader.target}"], []
    downloader.succeeds(env=downloader.as_environment())
    downloader.succeeds(*options, env={"PRESIGNED_URL": "x", "MODEL_SIZE": "8B", "TARGET_FOLDER": "/dev/null/x"})


@pytest.mark.parametrize(
    ("url", "models", "reason"),
    [
        ("{}/x?" + SECRET, "7B", "no '*'"),
        ("ftp://host/*?" + SECRET, "7B", "does not begin with https://"),
        ("{}/* ?" + SECRET, "7B", "blank"),
        ("{}/*?Policy=" + SECRET, "7B", "cut off ('Signature=...' is missing)"),  # a shell ends the link at the first &
        ("{}/*?Policy=a&Signature=" + SECRET, "7B", "cut off ('Key-Pair-Id=...' is missing)"),
        ("{}/*?Policy=&Key-Pair-Id=b&Signature=" + SECRET, "7B", "cut off ('Policy=...' is missing)"),
        ("https://download.llamameta.net/*?x=" + SECRET, "7B", "cut off ('Policy=...' is missing): copy the whole link"),
        ("{}/*?" + SECRET, "7B,8B", "unknown model '8B'"),
        ("{}/*?" + SECRET, "*", "more than names"),
        ("{}/*?" + SECRET, "{}/*?" + SECRET, "more than names"),
        ("{}/*?" + SECRET, ",", "list of models is empty"),
    ],
)
def test_invalid_input_fails_before_any_request(downloader: Downloader, url: str, models: str, reason: str) -> None:
    url, models = url.format(downloader.server.address), models.format(downloader.server.address)
    assert reason in downloader.fails("--url", url, "--models", models, "--dir", str(downloader.target))
    assert reason in downloader.fails("--dir", str(downloader.target), stdin=f"{url}\n{models}\n")
    assert not downloader.server.requests and not downloader.target.exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--models", "7B"], "no link: give it with --url or PRESIGNED_URL"),
        (["--url", "https://host/*?" + SECRET], "no models: give some of 7B, 13B"),
        (["--url"], "--url needs a value"),
        (["--link=https://host/*?" + SECRET], "unknown option '--link'"),
        (["https://host/*?" + SECRET], "every value needs its option"),
    ],
)
def test_missing_or_unknown_options_fail_without_waiting_for_input(
    downloader: Downloader, options: list[str], reason: str
) -> None:
    assert reason in downloader.fails(*options)


def test_help_names_every_option_and_environment_variable() -> None:
    text = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    options, variables = ["--url", "--models", "--dir"], ["PRESIGNED_URL", "MODEL_SIZE", "TARGET_FOLDER"]
    expected = [*options, *variables, "https_proxy", "Meta's license", "70B-chat"]
    assert all(word in text for word in expected + re.findall(r"\bDOWNLOAD_\w+", SCRIPT.read_text()))
