"""The nine columns of Table 1."""
import evaluate
from data import Sample


def problem(id, letter, subject="natural science", hint="", image=None, grade="grade2", answer=0):
    p = {"subject": f"{subject} science", "hint": hint, "image": image, "grade": grade, "answer": answer, "choices": ["x", "y"]}
    return Sample(id, "", "", None, p), (id, f"So. The answer is {letter}.")


def test_nine_columns_counted_by_hand():
    rows = [problem("1", "A", "natural", hint="h", image="i.png"), problem("2", "B", "natural", grade="grade7"),
            problem("3", "A", "social", image="i.png", grade="grade12"), problem("4", "Z", "language", hint="h"),
            problem("5", "B", "language", grade="grade6", answer=1), problem("6", "B", "social", hint="h")]
    scores = evaluate.score([s for s, _ in rows], dict(text for _, text in rows))
    assert scores["columns"] == {"NAT": [1, 2], "SOC": [1, 2], "LAN": [1, 2], "TXT": [1, 3], "IMG": [2, 2], "NO": [1, 2],
                                 "G1-6": [2, 4], "G7-12": [1, 2], "Avg": [3, 6], "no IMG": [1, 4]}
    assert scores["unparsable"] == 1
    text = evaluate.table(scores).splitlines()
    assert text[0].split() == list(evaluate.COLUMNS)
    assert text[1].split() == ["50.00", "50.00", "50.00", "33.33", "100.00", "50.00", "50.00", "50.00", "50.00"]
    assert text[3].startswith("1 answers without a letter")
