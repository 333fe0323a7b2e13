"""The part of Helm's language that our chart uses. What Helm itself makes of the chart is compared in tests/chart."""

import pytest

from deploy.kubernetes.chart import CHART
from deploy.kubernetes.templating.evaluate import Templates
from deploy.kubernetes.templating.functions import FUNCTIONS
from deploy.kubernetes.templating.syntax import Call, TemplateError, parse


def rendered(text: str, **values) -> str:
    template = parse(text, "t.yaml")
    return Templates([template], {}).render(template.nodes, values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a {{ .x }} b", "a 1 b"),
        ("a\n  {{- .x -}}  \n b", "a1b"),
        ("a {{- /* nobody\n reads this */}} b", "a b"),
        ('{{ "}}" }}{{ `{{` }}', "}}{{"),
        ("{{ .deep.er }}{{ .deep.absent }}", "2"),
        ("{{ .yes }} {{ .no }} {{ .half }} {{ .whole }}", "true false 0.5 3"),
        ("{{ if .no }}a{{ else if .x }}b{{ else }}c{{ end }}", "b"),
        ("{{ if or .no .none }}a{{ else }}b{{ end }}", "b"),
        ("{{ with .deep }}{{ .er }}{{ else }}none{{ end }}", "2"),
        ("{{ with .none }}{{ .er }}{{ else }}{{ .x }}{{ end }}", "1"),
        ("{{ range .list }}<{{ . }}>{{ end }}", "<a><b>"),
        ("{{ range $i, $e := .list }}{{ $i }}{{ $e }}{{ $.x }}{{ end }}", "0a11b1"),
        ("{{ range $key, $value := .deep }}{{ $key }}={{ $value }}{{ end }}", "er=2"),
        ("{{ range .none }}x{{ else }}empty{{ end }}", "empty"),
        ("{{ $v := 1 }}{{ if .yes }}{{ $v = 2 }}{{ end }}{{ $v }}", "2"),
        ("{{ $v := 1 }}{{ if .yes }}{{ $v := 2 }}{{ end }}{{ $v }}", "1"),
        ('{{ .x | default 5 | printf "%v-%s" "a" }}', "a-1"),
        ("{{ (dict `k` .x).k }}", "1"),
        ('{{ define "t" }}[{{ . }}]{{ end }}{{ include "t" .x | quote }}', '"[1]"'),
        ("{{ .deep | toYaml | nindent 2 }}", "\n  er: 2"),
        ("{{ .list | toJson }}", '["a","b"]'),
        ("{{ and .yes .none }}|{{ and .yes .x }}|{{ or .x .absent.never }}", "|1|1"),
    ],
)
def test_renders_as_helm_would(text, expected):
    values = {"x": 1, "deep": {"er": 2}, "yes": True, "no": False, "none": None, "list": ["a", "b"]}
    assert rendered(text, **values, half=0.5, whole=3.0) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("\n{{ nothing 1 }}", "t.yaml:2: unknown function nothing"),
        ("{{ if .x }}", "t.yaml:1: if without end"),
        ("{{ end }}", "t.yaml:1: end without a block"),
        ("\n\n{{ .x", "t.yaml:3: an action that does not end"),
        ("{{ .x ! }}", "t.yaml:1: not understood: !"),
        ("{{ .absent.deeper }}", "t.yaml:1: nothing there that could have .deeper"),
        ("{{ $nobody }}", r"t.yaml:1: no variable \$nobody"),
        ('{{ include "absent" . }}', "t.yaml:1: no template absent"),
        ('{{ fail "told so" }}', "t.yaml:1: told so"),
        ('\n{{ define "t" }}\n{{ fail "inside" }}{{ end }}{{ include "t" . }}', "^t.yaml:3: inside"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text, complaint):
    with pytest.raises(TemplateError, match=complaint):
        rendered(text, x=1)


def functions_called(tree) -> set[str]:
    """Anywhere in a tree of nodes and values."""
    called = {tree.function} if isinstance(tree, Call) else set()
    parts = tree if isinstance(tree, tuple) else tree.values() if isinstance(tree, dict) else ()
    return called.union(*map(functions_called, parts))


def test_there_is_no_function_that_the_chart_does_not_use():
    files = [file for file in (CHART / "templates").iterdir() if file.suffix != ".txt"]
    called = set().union(*(functions_called(parse(file.read_text(), file.name)) for file in files))
    assert called - FUNCTIONS.keys() == {"include", "lookup", "and", "or"}
    assert FUNCTIONS.keys() - called == set()
