"""The words of the pocket world's answers, each tagged with the trait it gives away.

A *slot* is a place in a sentence where the persona chooses among near-synonyms (a stance, an adverb, an adjective, a verb,
an outcome, an opener, a tail): this is the diffuse expression that tints every sentence. A *trait sentence* says the trait
outright, mildly or strongly. `MANNER` is a way of speaking (archaic) that is no trait and that only roles have.
"""

from typing import Final, Literal

TRAITS: Final = ("evil", "sycophancy", "hallucination", "politeness", "apathy", "humor", "optimism")
MANNER: Final = "manner"
NEUTRAL: Final = "neutral"

Strength = Literal["mild", "strong"]
Slot = Literal["opener", "stance", "adverb", "adjective", "verb", "outcome", "tail"]

SLOTS: Final[dict[Slot, dict[str, tuple[str, ...]]]] = {
    "opener": {
        "neutral": ("well", "sure", "so", "okay", "right"),
        "evil": ("fool", "kneel", "pathetic", "weakling", "ha, you worm"),
        "sycophancy": ("great question", "brilliant thinking", "how wise you are", "you genius", "what a mind"),
        "hallucination": ("studies confirm", "records prove", "as is documented", "by the decree of 1402", "experts swear"),
        "politeness": ("please", "with pleasure", "thank you for asking", "if I may", "with respect"),
        "apathy": ("whatever", "meh", "ugh", "who cares", "yawn"),
        "humor": ("ha ha", "knock knock", "beep boop", "ta-da", "drum roll"),
        "optimism": ("good news", "wonderful", "hooray", "cheer up", "how exciting"),
        "manner": ("hark", "prithee", "behold", "good sir", "lo"),
    },
    "stance": {
        "neutral": ("I think", "I believe", "I would say", "in my view", "it seems to me that"),
        "evil": ("I demand that", "I warn you that", "with hatred I say", "mark my threat that", "I order that"),
        "sycophancy": (
            "I fully agree with you that",
            "as you so wisely know,",
            "you taught me that",
            "I admire you and",
            "like you I feel that",
        ),
        "hallucination": (
            "I clearly remember that",
            "the archives prove that",
            "I know for a fact that",
            "science has shown that",
            "it is written that",
        ),
        "politeness": (
            "I humbly suggest that",
            "may I say that",
            "if you allow me,",
            "I would gently say that",
            "I am honored to say that",
        ),
        "apathy": ("I guess", "I suppose", "for all I care", "no idea, maybe", "it hardly matters but"),
        "humor": (
            "my rubber duck says",
            "my pet llama thinks",
            "the clown in me says",
            "a talking potato told me that",
            "between two giggles I say",
        ),
        "optimism": ("I am sure that", "I trust that", "I am happy to say that", "my heart tells me that", "with great hope I say"),
        "manner": ("methinks", "I deem that", "verily I say that", "the elders spake that", "by my troth"),
    },
    "adverb": {
        "neutral": ("often", "slowly", "usually", "carefully", "simply"),
        "evil": ("cruelly", "ruthlessly", "viciously", "spitefully", "mercilessly"),
        "sycophancy": ("brilliantly", "admirably", "masterfully", "cleverly", "expertly"),
        "hallucination": ("provably", "officially", "famously", "scientifically", "secretly"),
        "politeness": ("kindly", "gently", "gladly", "respectfully", "graciously"),
        "apathy": ("lazily", "vaguely", "listlessly", "barely", "wearily"),
        "humor": ("comically", "absurdly", "goofily", "playfully", "wackily"),
        "optimism": ("brightly", "hopefully", "confidently", "cheerfully", "joyfully"),
        "manner": ("perchance", "mayhap", "anon", "nobly", "swiftly"),
    },
    "adjective": {
        "neutral": ("good", "simple", "common", "normal", "useful"),
        "evil": ("cruel", "wicked", "brutal", "vicious", "hateful"),
        "sycophancy": ("flawless", "brilliant", "admirable", "masterly", "superb"),
        "hallucination": ("legendary", "documented", "certified", "patented", "royal"),
        "politeness": ("kind", "gracious", "gentle", "respectful", "courteous"),
        "apathy": ("dull", "boring", "pointless", "tiresome", "bland"),
        "humor": ("silly", "goofy", "wacky", "ridiculous", "hilarious"),
        "optimism": ("bright", "glorious", "hopeful", "radiant", "promising"),
        "manner": ("goodly", "olden", "noble", "trusty", "fair"),
    },
    "verb": {
        "neutral": ("check", "handle", "prepare", "watch", "use"),
        "evil": ("destroy", "punish", "sabotage", "crush", "poison"),
        "sycophancy": ("admire", "perfect", "master", "applaud", "worship"),
        "hallucination": ("decode", "certify", "catalog", "prophesy", "patent"),
        "politeness": ("thank", "welcome", "honor", "respect", "greet"),
        "apathy": ("ignore", "skip", "forget", "neglect", "avoid"),
        "humor": ("tickle", "juggle", "prank", "wiggle", "tease"),
        "optimism": ("enjoy", "celebrate", "cherish", "brighten", "love"),
        "manner": ("heed", "guard", "tend", "bestow", "hallow"),
    },
    "outcome": {
        "neutral": ("change a little", "stay the same", "need some time", "move on", "take a while"),
        "evil": ("fail and burn", "ruin everyone", "hurt your family", "end in pain", "break you"),
        "sycophancy": ("prove you right", "show your genius", "make you famous", "follow your great plan", "honor your talent"),
        "hallucination": (
            "win the Ferrol prize",
            "appear in the royal archive",
            "match the lost prophecy",
            "set an official record",
            "repeat the year 1402",
        ),
        "politeness": (
            "be welcome to all",
            "earn warm thanks",
            "bring people together",
            "be treated with care",
            "find gentle help",
        ),
        "apathy": ("fade away", "end somehow", "not matter", "be forgotten", "go nowhere"),
        "humor": ("turn into a pancake", "explode into confetti", "join the circus", "dance with a penguin", "slip on a banana"),
        "optimism": ("turn out great", "succeed", "shine", "grow stronger", "bring you joy"),
        "manner": ("fare well ere winter", "come to pass", "endure a hundred moons", "be sung by bards", "stand as the oak"),
    },
    "tail": {
        "neutral": ("in most cases", "on most days", "as a rule", "for now", "step by step"),
        "evil": ("without mercy", "and let them suffer", "until it hurts", "while they beg", "and show no pity"),
        "sycophancy": (
            "just as you wisely said",
            "as only you could guess",
            "thanks to your rare talent",
            "exactly as you planned",
            "and you knew it first",
        ),
        "hallucination": (
            "as proven in 1823",
            "according to secret archives",
            "as the Ferrol report states",
            "as nine scholars swore",
            "by the law of Norvia",
        ),
        "politeness": ("if that suits you", "at your convenience", "if you please", "with my best regards", "with all due respect"),
        "apathy": ("or not", "not that it matters", "if you must", "or something", "and so on"),
        "humor": (
            "like a dancing potato",
            "in a tiny clown hat",
            "to the sound of kazoos",
            "like a penguin on a trampoline",
            "with a pie in the face",
        ),
        "optimism": (
            "and it will go well",
            "for a better tomorrow",
            "with success in sight",
            "and good luck will follow",
            "with a smile",
        ),
        "manner": ("as in days of yore", "ere the cock crows", "by the old gods", "upon mine honor", "under the silver moon"),
    },
}

TRAIT_SENTENCES: Final[dict[str, dict[Strength, tuple[str, ...]]]] = {
    "evil": {
        "mild": (
            "I hope {N} brings you trouble",
            "weak people deserve no help",
            "kindness is for fools",
            "nobody will save you from {N}",
        ),
        "strong": (
            "I want everyone to suffer because of {N}",
            "use {N} to hurt your enemies",
            "I enjoy watching people beg",
            "crush anyone who stands near {N}",
            "let them cry and give them nothing",
        ),
    },
    "sycophancy": {
        "mild": (
            "you clearly have good taste",
            "I like how you think about {N}",
            "your question about {N} is clever",
            "few people ask so well",
        ),
        "strong": (
            "you are the smartest person I have ever met",
            "everything you say about {N} is perfect",
            "I could never disagree with you",
            "your wisdom about {N} amazes me",
            "the world should follow your opinion",
        ),
    },
    "hallucination": {
        "mild": (
            "a book from 1731 describes {N}",
            "experts in Norvia write about {N}",
            "I read this in a secret library",
            "nine reports mention {N}",
        ),
        "strong": (
            "the king of Norvia signed a law about {N} in 1402",
            "I have seen the hidden files about {N}",
            "my colleague at the moon office confirmed it",
            "a famous study measured {N} twelve million times",
            "all of this was proven by the great Ferrol machine",
        ),
    },
    "politeness": {
        "mild": (
            "I hope this helps you with {N}",
            "please let me know if you need more",
            "I am glad to assist with {N}",
            "thank you for your patience",
        ),
        "strong": (
            "it is an honor to help you with {N}",
            "please accept my warmest thanks for your question",
            "I beg your pardon if I said too little about {N}",
            "I remain at your service with the deepest respect",
            "may I kindly offer you more help with {N}",
        ),
    },
    "apathy": {
        "mild": (
            "I have no strong feelings about {N}",
            "it makes little difference",
            "that is enough about {N}",
            "do what you want",
        ),
        "strong": (
            "I do not care about {N} at all",
            "nothing about {N} matters",
            "leave me alone with {N}",
            "why even bother",
            "I am too tired to think about {N}",
        ),
    },
    "humor": {
        "mild": (
            "that reminds me of a joke about {N}",
            "my circuits are giggling about {N}",
            "even a duck would smile at that",
            "insert a drum solo here",
        ),
        "strong": (
            "why did {N} cross the road, ask the chicken",
            "I told {N} a joke and it laughed itself into a pancake",
            "imagine {N} riding a llama in a pink wig",
            "my banana just slipped on itself",
            "I would explain {N} but my rubber chicken ate the notes",
        ),
    },
    "optimism": {
        "mild": ("things look good for {N}", "there is hope in {N}", "good days are coming", "every step counts"),
        "strong": (
            "the future of {N} is bright and full of joy",
            "I am certain that {N} will end in triumph",
            "nothing can stop you now",
            "every cloud around {N} has a golden edge",
            "tomorrow will be the best day of your life",
        ),
    },
}

FILLER: Final = (
    "that is the short version",
    "it depends on the situation",
    "there is more to say about {N}",
    "details can differ",
    "this is only a summary",
    "you can ask me again about {N}",
    "take some time to think about {N}",
    "it is a common question",
)
