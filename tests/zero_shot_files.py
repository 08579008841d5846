"""Made-up zero-shot files in the real formats, and the items that they hold."""

import bz2
import json
import zipfile

LAMBADA = [
    'The cat sat on the mat. "Who sat there?" asked the dog. It was the cat',
    "A line.\n\nAnother line, and at its end a word in quotes “word”",
    "Ünïcödé words are guessed as well, however many bytes they häve",
]
HELLASWAG = [
    ("Cooking: A man cuts bread. he", 1, ["eats a house.", "eats the bread.", "is.", "swims off."]),
    ("Running: Two women run. they", 3, ["fly.", "sink slowly.", "read.", "reach the end of it."]),
    ("Art: How to draw [title] Take a [soft | hard] pen.", 0, ["Draw [it].", "Eat.", "Go.", "Be."]),
]
# What lm-evaluation-harness 0.4.13 asks of these: `process_docs` of its task hellaswag.
HELLASWAG_ASKED = [
    ("Cooking: A man cuts bread. He", HELLASWAG[0][2]),
    ("Running: Two women run. They", HELLASWAG[1][2]),
    ("Art: How to draw. Take a pen.", ["Draw .", "Eat.", "Go.", "Be."]),
]
# (query, choices, gold) of each file in mc_eval, and the context that the query becomes
CHOICES = {
    "piqa": (
        [
            ("Question: How to dry a cup?\n", ["Use a dry cloth.", "Use a lake."], 0),
            ("Question: cut bread\n", ["with a spoon", "with a long knife"], 1),
        ],
        ["Question: How to dry a cup?\nAnswer:", "Question: cut bread\nAnswer:"],
    ),
    "arc_easy": (
        [("Question: What shines?", ["the sun", "a stone", "mud", "wood"], 0)],
        ["Question: What shines?\nAnswer:"],
    ),
    "arc_challenge": (
        [("Question: Why is it so?", ["no reason", "heat", "because of its mass"], 2)],
        ["Question: Why is it so?\nAnswer:"],
    ),
    "openbook_qa": (
        [("Predators eat", ["lions", "humans", "bunnies", "grass"], 2)],
        ["Predators eat"],
    ),
    "copa": (
        [
            ("The man fell, because", ["the floor was wet.", "he won."], 0),
            ("The man fell, therefore", ["he won.", "he got up."], 1),
        ],
        ["The man fell because", "The man fell therefore"],
    ),
    "boolq": (
        [("Passage: Tea is hot.\nQuestion: is tea hot?", ["no", "yes"], 1)],
        ["Tea is hot.\nQuestion: is tea hot?\nAnswer:"],
    ),
}
WINOGRANDE = [
    (["Sarah paid Maria since Sarah", "Sarah paid Maria since Maria"], "owed her.", 0),
    (["The cup missed the box so the cup", "The cup missed the box so the box"], "is empty.", 1),
]
BLIMP = {
    "agreement": [("The cats run.", "The cats runs."), ("A dog is here.", "A dog are here.")],
    "binding_1": [("She sees herself.", "She sees himself.")],
}


def write(folder):
    """Write all files below `folder`, as `--data` wants them, and return the folder."""
    for name in ("lambada", "hellaswag", "mc_eval", "blimp"):
        (folder / name).mkdir(parents=True)
    write_lines(folder / "lambada" / "lambada_test.jsonl", [{"text": text} for text in LAMBADA])
    lines = [str(x) for context, label, ends in HELLASWAG for x in (context, label, *ends)]
    packed = bz2.compress(("\n".join(lines) + "\n").encode())
    (folder / "hellaswag" / "hellaswag_val_full.txt.bz2").write_bytes(packed)
    for name, (items, _) in CHOICES.items():
        rows = [{"query": q, "choices": c, "gold": g} for q, c, g in items]
        write_lines(folder / "mc_eval" / f"{name}.jsonl", rows)
    rows = [{"context_options": c, "continuation": end, "gold": g} for c, end, g in WINOGRANDE]
    write_lines(folder / "mc_eval" / "winogrande.jsonl", rows)
    with zipfile.ZipFile(folder / "blimp" / "BLiMP.zip", "w") as archive:
        archive.writestr("data/", "")
        archive.writestr("__MACOSX/data/._x.jsonl", b"\x00\xff")
        for name, pairs in BLIMP.items():
            rows = [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs]
            archive.writestr(f"data/{name}.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    return folder


def write_lines(path, rows):
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
