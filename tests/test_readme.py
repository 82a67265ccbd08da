"""README is true: its example prints what it says, and is as short as it claims."""

import re
from pathlib import Path

from tests.readme_example import differences, example, run

README = Path(__file__).parents[1] / "README.md"


def test_example_prints_what_readme_shows():
    code, expected = example(README.read_text())
    assert differences(expected, run(code)) == []
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_links_lead_somewhere():
    prose = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)\)", prose)
    assert links
    assert [link for link in links if "://" not in link and not (README.parent / link).exists()] == []


def test_differences_are_seen():
    assert differences("FSI 0.10", "FSI 0.11") == []
    assert differences("FSI 0.10", "FSI 0.13") != []
    assert differences("FSI 0.10", "fsi 0.10") != []
    assert differences("a 0.1\nb 0.2", "a 0.1") != []
