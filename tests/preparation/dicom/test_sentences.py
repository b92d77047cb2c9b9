from clinfuse.preparation.dicom.sentences import one_line, some


def test_a_few_things_are_all_named_and_of_many_the_first_and_how_many_more():
    assert some(["a", (1, 2)]) == "a, (1, 2)"
    assert some(range(7)) == "0, 1, 2 and 4 more"


def test_what_a_library_complains_of_over_several_lines_fits_in_a_sentence():
    assert one_line(ValueError("bad\n\tbytes ")) == "bad bytes"
    assert one_line(EOFError()) == "EOFError"
    assert len(one_line(ValueError("x " * 500))) == 200
