"""The texts that the ``seed`` command puts into an empty library.

They are short, true and far apart, so that a question which shares no word with any of them has
one right answer.
"""

from __future__ import annotations

STARTERS: tuple[tuple[str, str], ...] = (
    (
        "The smell after rain",
        "Petrichor rises when the first drops hit dry ground: they fling tiny aerosols of plant "
        "oils and geosmin, a compound made by soil bacteria, into the breeze.",
    ),
    (
        "Why loaves rise overnight",
        "Yeast feeds slowly on the flour's sugars in the cold. The gas it gives off is caught in "
        "a web of gluten, and the long wait leaves a deeper, slightly sour taste.",
    ),
    (
        "The octopus in the jar",
        "Most of an octopus's neurons sit in its eight arms, which taste and decide on their own. "
        "One at an aquarium learnt to unscrew a lid from the inside.",
    ),
    (
        "A rope of proteins",
        "Dragline silk is tougher than steel of the same weight. The spider spins it at room "
        "temperature, from water and protein, and often eats the old web before it builds anew.",
    ),
    (
        "The lighthouse lens",
        "Fresnel cut the glass of a huge lens into thin concentric prisms, so that one small "
        "flame, gathered into a beam, could warn ships thirty kilometres away.",
    ),
    (
        "Roll back first",
        "When a deployment breaks production, restore the previous version before you look for "
        "the cause. Curiosity can wait until the customers are served again.",
    ),
    (
        "The shivering cluster",
        "In winter honeybees gather around their queen and shiver their flight muscles. The heart "
        "of the cluster stays above 20 degrees while snow lies on the hive.",
    ),
    (
        "Insulin, 1922",
        "A fourteen-year-old in Toronto, close to death from diabetes, was given an extract of "
        "pancreas. He recovered, and within a year hospitals across the continent had it.",
    ),
    (
        "Kintsugi",
        "A broken bowl is mended with lacquer and gold powder. The crack is not hidden: it "
        "becomes the most precious line of the piece.",
    ),
    (
        "The moon pulls twice",
        "The sea bulges on the side of the Earth that faces the moon and on the opposite side "
        "too, so most coasts see the water climb two times a day.",
    ),
    (
        "Sleep files the day",
        "While we dream, the hippocampus replays what happened and hands it to the cortex. "
        "Students who nap after studying often remember more than those who keep reading.",
    ),
    (
        "The A of the oboe",
        "Before a concert the orchestra takes its pitch from one oboe, whose tone is steady and "
        "bright enough to be heard through sixty musicians.",
    ),
    (
        "Compound interest",
        "Money that earns on its own earnings grows slowly and then all at once: at seven per "
        "cent a year a sum doubles about every ten years.",
    ),
    (
        "Blue ice",
        "Snow covered for centuries is pressed until its air bubbles vanish. The dense crystal "
        "swallows red light, and the glacier glows turquoise in its crevasses.",
    ),
    (
        "How the bicycle stays up",
        "No rider falls while rolling fast enough, for the rider, or the machine by itself, "
        "keeps steering into the fall and so brings the wheels back under the weight.",
    ),
    (
        "The first vaccine",
        "Milkmaids who had caught cowpox were spared by smallpox. Edward Jenner tested the "
        "rumour in 1796, and the disease is now gone from the Earth.",
    ),
    (
        "Espresso, nine bars",
        "Hot water is forced through finely ground coffee in under half a minute. Too coarse and "
        "the cup is thin and sour; too fine and it turns bitter.",
    ),
    (
        "The knight's tour",
        "Can a knight visit every square of the chessboard exactly once? Euler studied it in "
        "1759, and today it is a first exercise in backtracking.",
    ),
    (
        "Letters of the Great Library",
        "Ships that docked in Alexandria had their scrolls taken and copied. Some say the owners "
        "got back the copies, while the originals stayed on the shelves.",
    ),
    (
        "Heirloom tomatoes",
        "Plant the seedling deep, up to its first leaves: the covered stem grows roots. Water the "
        "soil, never the foliage, and pick the fruit when it is warm.",
    ),
    (
        "Arctic terns",
        "A bird lighter than a hundred grams flies from the far north to the far south and back "
        "each year, and so sees more daylight than any other creature.",
    ),
    (
        "The queue at the bank",
        "One line that feeds all counters is fairer than a line for each. The average wait is "
        "shorter, and no customer is stuck behind another one with a bag of coins.",
    ),
    (
        "Writing without a margin",
        "Fermat noted beside his copy of Diophantus that he had a marvellous proof which the "
        "page was too narrow to hold. It took mathematicians 358 years to find one.",
    ),
    (
        "A cure for hiccups",
        "The diaphragm jerks and the vocal cords snap shut. Holding the breath raises carbon "
        "dioxide in the blood, which seems to calm the reflex.",
    ),
    (
        "The nurse's diagram",
        "Florence Nightingale drew the deaths of the Crimean War as coloured wedges. Ministers "
        "who had skipped her tables understood at a glance that filth killed more than bullets.",
    ),
)
