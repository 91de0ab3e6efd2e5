import pytest

from misa_engine.cli.parsing import MODEL_FLAGS, Parser, names, positive, positive_size, truth
from misa_engine.errors import UserError


def parser() -> Parser:
    made = Parser("misa try")
    made.add_argument(*MODEL_FLAGS)
    made.add_argument("--max_length", type=positive)
    made.add_argument("--gib", type=positive_size)
    made.add_argument("--packing", type=truth, nargs="?", const=True)
    made.add_argument("--methods", type=names)
    return made


def test_an_option_may_be_written_with_hyphens_and_help_shows_it_once():
    assert parser().parse_args(["--max-length", "7"]).max_length == 7
    assert parser().parse_args(["--model-name-or-path", "a"]).model == parser().parse_args(["--model=a"]).model == "a"
    assert "--max-length" not in parser().format_help()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--max_lenght", "7"], "misa try: unrecognized arguments: --max_lenght 7. Did you mean --max_length?"),
        (["--max_len", "7"], "unrecognized"),
        (["--max_length", "0"], "a whole number of at least 1, not 0"),
        (["--max_length", "2.5"], "a whole number, not '2.5'"),
        (["--gib", "inf"], "a number above 0, not inf"),
        (["--gib", "nan"], "a number above 0, not nan"),
        (["--gib", "much"], "a number, not 'much'"),
        (["--packing", "maybe"], "true or false, not 'maybe'"),
        (["--max_length"], "expected one argument. See misa try --help."),
    ],
)
def test_a_wrong_value_is_a_user_error_that_names_command_and_remedy(words, text):
    with pytest.raises(UserError, match="^misa try: ") as caught:
        parser().parse_args(words)
    assert text in str(caught.value)


def test_values_are_read_as_people_write_them():
    found = parser().parse_args(["--packing", "--methods", "misa, adamw,"])
    assert found.packing is True and found.methods == ("misa", "adamw")
    assert [truth(word) for word in ("Yes", "0", "off", "TRUE")] == [True, False, False, True]


def test_a_percent_sign_in_a_help_text_is_a_percent_sign():
    made = Parser("misa try")
    made.add_argument("--share", help="5% of it, or 10%%", default=3)
    assert "5% of it, or 10%" in made.format_help()
