"""A grammar of short stories: a hero, a place, a wish, an obstacle, a helper, an end.

`story(rng, ...)` gives a request, the story, and what may be said when the listener asks what happened
next. In the texts `$name` and its like stand for what was drawn; `{x|y}` means either.
"""

from dataclasses import dataclass

SHE = dict(he="she", him="her", his="her", He="She", His="Her")
HE = dict(he="he", him="him", his="his", He="He", His="His")

PEOPLE = {
    "girl": SHE, "boy": HE, "princess": SHE, "prince": HE, "queen": SHE, "king": HE, "baker": HE, "gardener": SHE, "knight": HE,
    "pirate": SHE, "wizard": HE, "witch": SHE, "sailor": HE, "astronaut": SHE, "painter": SHE, "farmer": HE, "inventor": SHE,
    "giant": HE, "fairy": SHE, "mermaid": SHE, "detective": SHE, "engineer": SHE, "child": SHE, "teacher": SHE,
}
CREATURES = """robot fox dragon cat dog owl mouse bear rabbit hedgehog squirrel frog snail bee crow wolf horse donkey cow pig goat sheep
duck penguin whale dolphin turtle elephant lion tiger monkey parrot beaver deer spider butterfly kitten puppy dinosaur unicorn
ghost monster alien snowman train boat cloud star tree computer grape toaster""".split()
# Many kinds, so that what is learned is to take the word that the listener said, not which words there are.
KINDS = CREATURES + """ant|badger|bat|bear cub|beetle|bison|buffalo|bull|calf|camel|canary|caterpillar|centipede|chameleon|cheetah|chicken|chick|chipmunk|cicada|clam|cobra|cockroach|cod|coyote|crab|crane|cricket|crocodile|cuckoo|
deer mouse|dingo|dove|dragonfly|dromedary|eagle|eel|emu|falcon|ferret|finch|firefly|fish|flamingo|flea|fly|gazelle|gecko|gibbon|giraffe|goldfish|gorilla|grasshopper|groundhog|gull|guinea pig|hamster|hare|hawk|heron|hippo|
hornet|hummingbird|hyena|ibex|iguana|jackal|jaguar|jellyfish|kangaroo|kingfisher|koala|ladybird|lamb|lark|lemming|lemur|leopard|lobster|locust|lynx|macaw|magpie|mammoth|manatee|marmot|meerkat|mole|mongoose|moose|mosquito|
moth|mule|narwhal|newt|nightingale|octopus|opossum|orca|ostrich|otter|ox|oyster|panda|panther|peacock|pelican|pheasant|pigeon|polar bear|pony|porcupine|prawn|puffin|puma|python|quail|raccoon|ram|rat|raven|red panda|reindeer|rhino|robin|
rooster|salamander|salmon|scorpion|sea lion|sea horse|seal|shark|shrew|shrimp|skunk|sloth|slug|snake|sparrow|squid|starfish|stork|swallow|swan|swift|tadpole|tapir|termite|thrush|toad|tortoise|toucan|trout|tuna|turkey|vole|vulture|wallaby|
walrus|wasp|water buffalo|weasel|wild boar|wombat|woodpecker|worm|yak|zebra|acrobat|actor|apprentice|archer|artist|athlete|baby|barber|beekeeper|blacksmith|boatman|bookseller|butcher|captain|carpenter|chef|clown|cobbler|conductor|cook|
cowboy|dancer|dentist|diver|doctor|driver|elf|explorer|ferryman|firefighter|fisherman|gnome|goblin|grandmother|guard|hermit|hero|hunter|janitor|judge|juggler|librarian|lighthouse keeper|locksmith|magician|mailman|mayor|mechanic|merchant|
messenger|miller|miner|monk|musician|neighbour|ninja|nurse|ogre|page|pilot|plumber|poet|policeman|postman|potter|programmer|ranger|sailor boy|samurai|scientist|shepherd|shoemaker|singer|soldier|spy|stranger|student|tailor|thief|traveller|
troll|vampire|viking|wanderer|watchmaker|weaver|werewolf|woodcutter|yeti|zombie|airplane|apple|balloon|banana|bell|bicycle|blanket|book|bottle|box|brick|bridge|broom|brush|bucket|bulldozer|button|cake|candle|car|carrot|chair|cheese|clock|
coat|coin|compass|cookie|crane truck|crayon|cup|door|drone|drum|feather|flower|flute|fork|fridge|gate|glove|guitar|hammer|hat|helicopter|house|kettle|key|kite|ladder|lamp|lantern|leaf|lemon|letter|lighthouse|lorry|mirror|mitten|moon|
mountain|mushroom|nail|needle|node|onion|oven|paper boat|pea|pear|pebble|pencil|penny|piano|pillow|planet|plum|potato|puddle|pumpkin|puppet|raindrop|raisin|river|rocket|rose|sailboat|satellite|scarecrow|server|shadow|ship|shoe|sock|spoon|
statue|stone|submarine|sunflower|table|taxi|teapot|teddy bear|tent|tomato|tractor|truck|trumpet|tugboat|umbrella|vine|violin|volcano|wagon|watch|wave|whistle|windmill|window""".replace("\n", "").split("|")
USUAL = "robot fox dragon cat dog mouse owl bear rabbit girl boy hedgehog".split()
ASKED_TRAITS = """little old tiny big lonely lazy friendly hungry happy sad sleepy grumpy clumsy wise silly lost tired red blue green golden purple white black quiet noisy magic polite strong fast
slow proud gentle nervous talking flying invisible forgetful small brave shy curious clever kind young cheerful""".split()

PLACES = ["a green valley", "a small village", "an old forest", "a town by the sea", "a quiet harbour", "a house on a hill", "a big city",
          "a snowy land", "a garden behind a mill", "a house on an island", "a castle of grey stone", "a little farmhouse", "a vineyard", "a desert",
          "a lighthouse", "a library", "a space station", "a village in the mountains", "a river town", "a meadow full of flowers"]
ASKED_PLACES = {"in the forest": "an old forest", "by the sea": "a town by the sea", "in a castle": "a castle of grey stone",
                "on an island": "a house on an island", "in the city": "a big city", "in space": "a space station", "on a farm": "a little farmhouse",
                "in the mountains": "a village in the mountains", "in a vineyard": "a vineyard", "in a library": "a library",
                "in the desert": "a desert", "in a village": "a small village", "in winter": "a snowy land", "in a garden": "a garden behind a mill"}

# Each plot: themes that a listener may name, then one line of choices for each part of the story.
PLOTS = [
    dict(name="Mina", pronouns=SHE, helper="an old owl named Ida", hname="Ida", themes=["a lost key", "a key", "a door", "a secret", "a treasure", "a mystery"], lines=[
        "{One morning|One day|One windy day} $name found {a rusty key|a little silver key|a golden key} {in the grass|under a stone|beside the path}.",
        "\"{Which door does it open?|What could it open?}\" $he wondered{, and set out to look|}.",
        "$He tried {the gate, the cellar and the old chest|every door in the street|the mill, the tower and the barn}, but the key {would not turn|did not fit} anywhere.",
        "{Tired and a little sad|When evening came}, $name sat down, and there $he met $helper.",
        "\"{Some keys are not for doors|Look lower than doors},\" said $hname. \"{Try the music box|Try the little box} under {the oak|the old bench}.\"",
        "$name {ran|went} there and turned the key. The box opened and played a soft {tune|song}, {and everybody nearby came to listen|and the whole place grew quiet to hear it}.",
        "{From then on|After that day}, $name and $hname played it every evening, {and nobody there was lonely again|and they became the best of friends}."]),
    dict(name="Pip", pronouns=HE, helper="a tiny mouse named Dot", hname="Dot", themes=["the dark", "fear", "courage", "the night", "bravery", "being brave"], lines=[
        "$name was {good at many things|happy all day long}, but $he was afraid of the dark.",
        "{One evening|One night} the {wind|storm} blew out every {lamp|light}, and {a small voice called for help|somebody outside began to cry}.",
        "$name's heart {beat fast|jumped}. \"{I am afraid|The dark is so big},\" $he whispered, \"but somebody needs me.\"",
        "Step by step $he went {into the night|out into the dark}, and {by the well|behind the wall|under a bush} $he found $helper, who had lost the way home.",
        "\"{I was afraid too|I thought that nobody would come},\" said $hname. \"{Together it is not so dark|With two of us the dark is smaller}.\"",
        "They walked {hand in hand|side by side}, and $name saw {the stars for the first time|how many stars there were}.",
        "Since that night $name {is no longer afraid|has liked the dark}, because {that is when the stars come out|the dark is where $he found a friend}."]),
    dict(name="Nora", pronouns=SHE, helper="a patient beaver named Otto", hname="Otto", themes=["a bridge", "a river", "building", "teamwork", "working together"], lines=[
        "One {spring|autumn} the river {rose|grew wild} and {carried away|broke} the only bridge.",
        "$name wanted to {visit a friend|bring bread to the people} on the other side, but the water was {too deep|too fast}.",
        "First $he {threw stones into the water|laid a long branch across}, but the river {swept it all away|took it at once}.",
        "Then $helper came by and watched. \"{One cannot build a bridge alone|A bridge needs many hands},\" said $hname. \"{Let us ask the others|Call the others}.\"",
        "So they asked everyone, and everyone brought {something: a rope, a board, a nail|what they had: rope, wood and nails}.",
        "By {evening|the third day} a new bridge stood there, {a little crooked but strong|stronger than the old one}.",
        "$name was the first to cross it, and on the other side {$he laughed for joy|$his friend was waiting}. \"{We did it together|This is everybody's bridge},\" $he said."]),
    dict(name="Emil", pronouns=HE, helper="a wise gardener named Rosa", hname="Rosa", themes=["a garden", "rain", "a seed", "a plant", "patience", "flowers", "nature", "spring"], lines=[
        "$name had {a single seed|one small seed} and wanted {nothing more than|only} to see it grow.",
        "$He put it into the earth and {waited, but nothing happened|watched it every morning}. {A week went by|Many days went by}, and the ground stayed bare.",
        "\"{Perhaps it is a bad seed|Perhaps I did it wrong},\" thought $name, and {nearly gave up|was sad}.",
        "$helper, who lived next door, smiled. \"{A seed works in secret|Much happens that we cannot see},\" said $hname. \"{Give it water and time|Water it, and be patient}.\"",
        "So $name carried water each {day|evening}, {even when it was hot|even when $he was tired}, and {told the seed stories|sang to it}.",
        "One morning a {tiny|little} green leaf {looked out of|stood in} the earth, and by summer there was a {tall flower|vine full of sweet grapes}.",
        "$name shared {it|its fruit} with everybody, and kept {one seed|a few seeds} for {the next year|another spring}."]),
    dict(name="Juno", pronouns=SHE, helper="an old crow named Hugo", hname="Hugo", themes=["a star", "the moon", "the sky", "a wish", "space", "the sun"], lines=[
        "{Every night|Each evening} $name looked up at one {little|bright} star and {waved to it|wished it good night}.",
        "One night the star was {gone|missing}, and $name {could not sleep|was worried}.",
        "$He {climbed the highest hill|went out} to look for it, and {behind the hill|in a pond} $he found it: {small, cold and crying|very small and very cold}.",
        "\"I fell,\" said the star, \"and I do not know the way back.\"",
        "$name asked $helper, who {knew the wind|knew the way of the birds}. \"{A star flies when it is warm|It only needs to be warm},\" said $hname. \"{Hold it close|Keep it near your heart}.\"",
        "So they {held the star between them|kept it warm all night}, and it began to glow, {brighter and brighter|first a little and then a lot}.",
        "Before morning it {rose|flew} back into the sky. And now, when $name waves, the star {blinks twice|waves back with its light}."]),
    dict(name="Leo", pronouns=HE, helper="a grey rabbit named Fern", hname="Fern", themes=["a race", "winning", "sport", "speed", "running", "a competition"], lines=[
        "Every year there was a {great|big} race {around the hill|to the old oak}, and $name had never won it.",
        "This time $he had {trained for weeks|practised every morning}, and {at the start|after the first bend} $he was ahead of everyone.",
        "{But halfway|Then, in the middle of the way}, $he saw $helper sitting {beside the path|in the grass} with a hurt foot.",
        "\"{Run on|Do not stop for me},\" said $hname. \"{You can win|You are the fastest}.\"",
        "$name looked at the {finish|way ahead} and then at $hname. {It was not a hard choice|It took only a moment to decide}. $He stopped and helped.",
        "Together they came in last, {slowly, step by step|one small step after another}, and {everybody was waiting|the whole place was watching}.",
        "Nobody remembers who won {that day|that race}, but everybody remembers {how $name came in last|the two who came in last}."]),
    dict(name="Selma", pronouns=SHE, helper="a tired wanderer named Karl", hname="Karl", themes=["bread", "food", "hunger", "sharing", "kindness", "a cake", "winter", "cooking"], lines=[
        "It was a {hard|cold} winter, and $name had only {one loaf of bread|a small bowl of soup} left.",
        "{There was a knock at the door|Somebody knocked}. Outside stood $helper, {hungry and cold|wet and shivering}.",
        "$name {thought for a moment|looked at the food}. \"{It is not much|It is little},\" $he said, \"but half of it is yours.\"",
        "They ate by the fire, and $hname told {wonderful stories|stories of far lands} until {the night was over|the fire burned low}.",
        "In the morning the guest was gone, but {on the table|by the door} lay {a small bag of seeds|a little sack of grain}.",
        "$name {planted them|put them into the earth} in spring, and {they grew as nothing had grown before|the field became golden}.",
        "That autumn nobody there was hungry, and $name always kept {a chair free|one place free at the table} for {a guest|whoever might knock}."]),
    dict(name="Finn", pronouns=HE, helper="a friendly dolphin named Lina", hname="Lina", themes=["a storm", "the sea", "a ship", "a boat", "rescue", "water", "the ocean", "a journey"], lines=[
        "$name had built a {little boat|small wooden boat} and dreamed of {the open sea|far shores}.",
        "One {bright|calm} morning $he set out, {singing|with a piece of bread and a map}, but by noon {the sky turned black|dark clouds came}.",
        "The waves {rose like hills|grew as high as houses}, and the {sail tore|rudder broke}.",
        "\"{Hold on|Do not be afraid}!\" called a voice. It was $helper, {who knew these waters well|who had seen many storms}.",
        "\"{Do not fight the waves|Do not row against them},\" said $hname. \"{Turn the boat and let them carry you|Go with them, and look for the light}.\"",
        "$name did so, and {the waves carried the boat|the storm itself pushed the boat} to a {quiet bay|safe shore}.",
        "When the sun came back, they mended the {sail|boat} together, and {the next journey they made as two|from then on they sailed together}."]),
    dict(name="Viola", pronouns=SHE, helper="a kind hedgehog named Moss", hname="Moss", themes=["a song", "music", "a voice", "singing", "dancing", "art"], lines=[
        "$name loved music, but {whenever $he sang, only a squeak came out|$he was too shy to sing before others}.",
        "Soon there would be a great {festival|feast}, and everyone {had a song to sing|was to bring a song}.",
        "$name {practised in secret|hid behind the barn}, and {was sure that nobody heard|sang as softly as a leaf}.",
        "But $helper had {heard every note|been listening}. \"{Your song is small, but it is true|It is not loud, but it is yours},\" said $hname. \"{Sing it as you are|Small songs are for those who listen}.\"",
        "On the evening of the {festival|feast} $name stepped forward, {closed $his eyes|took a deep breath}, and sang.",
        "It was so quiet that {everybody had to lean in|the others held their breath}, and when it ended {nobody wanted to speak|some of them had tears in their eyes}.",
        "Since then the festival begins with {a small song|a quiet song}, and {it is always $name who sings it|nobody there is too shy to sing}."]),
    dict(name="Felix", pronouns=HE, helper="a tall giraffe named Olive", hname="Olive", themes=["a letter", "a message", "a promise", "a message that had to arrive", "the post"], lines=[
        "$name was given a letter {to carry over the mountain|for somebody far away}, and promised {to bring it there by night|not to lose it}.",
        "The way was {long|steep}, and soon {snow began to fall|a thick fog came down}.",
        "{A strong wind|Suddenly a gust} tore the letter away and {blew it into a tree|carried it over a wall}.",
        "$name {could not reach it|jumped, but it was too high}. Then $helper came along. \"{I cannot go your way|I am too slow for the mountain},\" said $hname, \"but I can {reach that|get that for you}.\"",
        "With the letter safe again, $name {walked on and did not stop|hurried on}. {Just before night|At the last light of day} $he knocked at the door.",
        "The letter said only: \"{Come home, all is well|I am well, and I miss you}.\" {The reader wept for joy|It was the best news of the year}.",
        "On the way back $name {thanked $hname with a hug|brought $hname a warm loaf}, for {a promise is easier to keep with a friend|no message gets through alone}."]),
    dict(name="Tilda", pronouns=SHE, helper="a shy badger named Bruno", hname="Bruno", themes=["friendship", "a friend", "loneliness", "love", "two friends", "making friends"], lines=[
        "$name had {a warm home|everything that one needs}, but no friend, {and the evenings were long|and so the days were long}.",
        "{One day|At last} $he painted a sign: \"{Friend wanted|Looking for a friend}.\" {But nobody came|Many walked past, but nobody stopped}.",
        "When it began to rain, $name {went out to take the sign in|saw somebody standing under the sign}. There stood $helper.",
        "\"{I cannot read|I was only looking for a dry place},\" said $hname. \"{Is it a good sign?|May I stay until the rain is over?}\"",
        "$name laughed and made {tea|soup}, and they talked until {the rain had stopped|the moon was high}.",
        "\"{Come again tomorrow|Will you come again?},\" said $name{, a little shy|}. And $hname came, {the next day and every day|tomorrow and every day after}.",
        "The sign still hangs {beside the door|there}, but now it says: \"{Friends live here|Friends found}.\""]),
    dict(name="Max", pronouns=HE, helper="an old goat named Greta", hname="Greta", themes=["a map", "an adventure", "a treasure map", "gold", "exploring", "a cave"], lines=[
        "In {an old book|a dusty drawer} $name found a map with a {red cross|little cross} on it.",
        "\"{A treasure|That must be a treasure}!\" $he cried, {packed a bag|put on $his boots} and {set out at once|left before breakfast}.",
        "The map led {through a swamp and up a cliff|over three hills and through a dark wood}, and there $name {lost the way|stood before a deep ravine}.",
        "$helper was sitting there, {as if waiting|calm as a stone}. \"{I know that map|I have seen that map before},\" said $hname. \"{I will show you the way if we share|Let us go together and share what we find}.\"",
        "They {helped each other over every rock|took turns to lead}, and at the cross they dug {until their arms were sore|all afternoon}.",
        "In the chest lay no gold, only a {spyglass|paper} and {the words: look back|a note: look behind you}. They turned, and before them lay {the whole land in the evening sun|the most beautiful view in the world}.",
        "\"{It is a treasure after all|That is worth more than gold},\" said $name, and they came back {every year|again and again} to see it."]),
    dict(name="Clara", pronouns=SHE, helper="a clever cat named Tick", hname="Tick", themes=["a broken clock", "a machine", "an invention", "technology", "a problem", "work", "learning", "failure"], lines=[
        "The great clock {of that place|on the tower} had stopped, and {nobody knew what time it was|since then everyone was late for everything}.",
        "$name wanted to mend it, though {everybody laughed|nobody thought that $he could}.",
        "$He {cleaned every wheel|took it apart and put it together}, but the clock {only coughed|stayed still}. $He tried again, and {failed again|again it did not move}.",
        "\"{What did you learn?|And what do you know now?}\" asked $helper, who had been watching.",
        "\"{That it is not the wheels|Where the fault is not},\" said $name slowly. \"{Then you are nearly there|That is how one finds it},\" said $hname.",
        "$name looked once more, and {behind the smallest wheel|deep inside} $he found {a grain of sand|a tiny seed}. $He blew it away, and tick, tock, the clock went on.",
        "{The bells rang|All the bells rang}, and everybody came out to {cheer|thank $name}. $He had failed {nine times and won once|many times}, and {that was enough|it had been worth it}."]),
    dict(name="Theo", pronouns=HE, helper="a gentle deer named Willa", hname="Willa", themes=["home", "the way home", "getting lost", "being lost", "a path", "family"], lines=[
        "One day $name {followed a butterfly|walked further than ever before} and got lost.",
        "{All the trees looked the same|Every path looked the same}, and {it was getting late|the sun was going down}.",
        "\"{I must not be afraid|I will think},\" $he said, and {listened|sat down to think}.",
        "Then $helper came {along the path|out of the bushes}. \"{I do not know your home|I have never been there},\" said $hname, \"but {I know the stream, and streams lead to people|I know somebody who may}.\"",
        "{They followed the water|From one to the next they asked}, {and each one they met knew a little more|and everyone they met helped a little}.",
        "At last $name saw {a light in a window|smoke over a roof}. It was home, and {the door was open|there was soup on the table}.",
        "$hname stayed for supper, and $name learned that {nobody is lost who can ask|a long way is short when many help}."]),
]

SEQUELS = [
    "The next morning they met again. They {shared bread and tea|sat in the sun} and {planned a new adventure|laughed about it all}. But that is another story.",
    "After that {everyone slept for a whole day|they rested a little}. Then they {told everyone what had happened|went out to see what else there was}. They are still friends today.",
    "They remained friends. Each year, on the same day, they {remembered it with a small feast|told the story again}, and each year it {grew a little longer|was a little better}.",
]
MORALS = ["{Kindness comes back|What you share grows|Nobody does it all alone}: that is what the story says, I think.",
          "I think it says that {a friend makes hard things easier|asking for help is no shame|small ones can do great things}."]

ASK = ["{tell|Tell} me {a|a short|another|one more|a little|a nice|a good} {story|tale}$about{.|!||, please}", "{can|could|would} you tell me a {story|short story|tale}$about?", "{write|make up|invent|give me|create} a {short story|story|little story|tale}$about{.||, please}",
       "I want {a story|to hear a story}$about", "I would like {a|to hear a} story$about{.||, please}", "a story$about{, please|}", "story$about", "{please tell|tell} me a story$about",
       "do you know a story$about?", "{let's hear|let us hear} a story$about", "{how about|what about} a story$about?", "read me a story$about", "tell a story$about", "once upon a time$about",
       "{bedtime story|a bedtime story|tell me a bedtime story}$about{.||, please}", "can I {have|get} a story$about?", "I'd love a story$about", "{maybe|now} a story$about?", "write me a story$about", "short story$about{.||, please}", "story time$about{!|}"]
ASK_HERO = ["make $hero the hero of a {story|tale}", "can $hero be in {a|the|your} story?", "put $hero {in|into} a story{, please|}", "let $hero {have an adventure in a story|appear in a tale}", "$hero: {a|one} story{, please|}",
            "{tell|write} me something with $hero in it, a story", "$hero should be in {the|your|a} {story|tale}", "{a|one} {story|tale} in which $hero {appears|plays a part|is the hero}", "I like stories, {one|the next one} with $hero please"]


@dataclass
class Story:
    ask: str
    text: str
    sequel: str
    moral: str


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def coined(rng):
    """A made-up word, so that the model meets words that nobody knows."""
    onset = "b c d f g h j k l m n p r s t v w z bl br ch cl dr fl gr kn pl qu sh sl sn sp st th tr wh".split()
    vowel = "a e i o u ai ee oo ou".split()
    coda = ["", "", "", "n", "r", "l", "t", "m", "s", "ck", "ng", "mp", "nd", "bble", "dle"]
    return "".join(rng.choice(onset) + rng.choice(vowel) for _ in range(rng.choice([1, 2, 2, 3]))) + rng.choice(coda)


def hero(rng) -> str:
    """What the story shall be about: a usual kind, any of many, or a word that nobody knows."""
    draw = rng.random()
    if draw < 0.35:
        return rng.choice(CREATURES + list(PEOPLE))
    return rng.choice(KINDS) if draw < 0.78 else coined(rng)


def asked_hero(rng, kind: str):
    """(the hero as the story calls it, as the listener asks for it)."""
    word = rng.choices(["about", "with", "of", "featuring", "starring"], [80, 8, 6, 3, 3])[0]
    if rng.random() < 0.25:
        kind = f"{rng.choice(ASKED_TRAITS)} {kind}"
    return a(kind), f" {word} {a(kind)}"


def story(rng, expand) -> Story:
    """Names belong to plots: a model of this size keeps to a name that it knows, not to one that it must copy."""
    place, mode = rng.choice(PLACES), rng.random()
    named = 0.20 <= mode < 0.92
    kind = hero(rng) if named else rng.choice(USUAL)
    plot = rng.choice([p for p in PLOTS if PEOPLE.get(kind, p["pronouns"]) is p["pronouns"]])
    told, about = a(kind), ""
    if named:
        told, about = asked_hero(rng, kind)
        if mode >= 0.85:
            asked = rng.choice(list(ASKED_PLACES))
            place, about = ASKED_PLACES[asked], f"{about} {asked}"
    elif mode < 0.08:
        about = f" about {rng.choice(plot['themes'])}"
    names = {"$name": plot["name"], "$helper": plot["helper"], "$hname": plot["hname"], **{f"${k}": v for k, v in plot["pronouns"].items()}}
    start = rng.choice(["Once there was $told named $name, who lived in $place.", "There was once $told named $name, who lived in $place."])
    start = start.replace("$place", place).replace("$told", told)
    end = rng.choice(["That was the story of the $kind.", "And that is the story of $name the $kind."]).replace("$kind", kind)
    text = " ".join(sentence_case(substitute(expand(t), names)) for t in [start, *plot["lines"], end])
    asks = ASK_HERO if 0.20 <= mode < 0.30 else ASK
    return Story(expand(rng.choice(asks)).replace("$about", about).replace("$hero", told), text, expand(rng.choice(SEQUELS)), expand(rng.choice(MORALS)))


def substitute(text, names):
    for key in sorted(names, key=len, reverse=True):
        text = text.replace(key, names[key])
    return text


def sentence_case(text):
    """A sentence that begins with a drawn word begins with a capital letter."""
    out, start = "", True
    for c in text:
        if c == '"' and out[-1:] in ("?", "!"):
            start = False  # the sentence goes on after the quotation: "Why?" she asked.
        out += c.upper() if start and c.isalpha() else c
        start = (start and not c.isalnum()) or c in ".!?"
    return out
