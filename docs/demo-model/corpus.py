"""Generates the conversations that the built-in model learns from: same seed, same bytes.

All text is written in this folder: `facts.py` (Grapevine), `stories.py` (a story grammar) and here (small
talk and what lies outside the model's range). Run it to look at some: `python corpus.py 20`.
"""

import json
import os
import random
import re
import sys

import stories
from facts import FACTS
from wordings import SYNONYMS, WORDINGS

for fact in FACTS:
    for pool, texts in WORDINGS.get(fact.id, {}).items():
        getattr(fact, pool).extend(texts)

# ---------------------------------------------------------------- small talk: [questions], [answers]
HELP = "{Ask me about Grapevine, or for a short story.|I can explain Grapevine or tell a short story.|You can ask me how to start a node, or for a story.}"

TALK = [
    (["hi", "hello", "hey", "hey there", "hi there", "hello there", "good {morning|evening|afternoon|day}", "good {morning|evening|afternoon|day}{ to you| there| friend| model| everyone|, Grapevine}", "a {good|very good} {morning|evening|day} to you", "good {morning|evening|afternoon}, how is it going?", "{hi|hello|hey} {good morning|good evening|good afternoon}", "{hello|hi|hey} {to you|my friend|everyone|dear model|little model|demo model|assistant}", "evening", "greetings", "howdy", "yo", "hiya", "hallo", "hi {friend|Grapevine|vine|bot}", "hello {friend|Grapevine|vine|model|robot|world}",
      "hello!", "hi!", "Hey!", "hello hello", "heya", "hi, how is it going?", "hello, are you there?", "is anyone there?", "anybody home?", "are you there?", "say hello", "say hi", "sup", "hello, nice to meet you", "nice to meet you", "hey you", "good to see you", "hello again", "hi again", "morning", "welcome"],
     ["Hello! I am the built-in demo model of Grapevine. {Ask me about Grapevine, or for a short story.|Ask me how to start a node, or ask for a short story.}"], 3.5),
    (["how are you?", "how are you doing?", "how do you do?", "how is it going?", "how's it going?", "what's up?", "are you {well|ok|fine|okay|happy}?", "how are you today?", "how do you feel?", "how have you been?", "hi, how are you?", "hello, how are you?", "hey, how are you doing?", "you good?", "how was your day?", "everything ok?", "how r u"],
     ["I am well, thank you: {all my weights are in place|my numbers are all in place}. {What would you like to know about Grapevine?|How can I help you with Grapevine?}"], 1),
    (["thanks", "thank you", "thank you very much", "thanks a lot", "thx", "ty", "great, thanks", "thanks, that {helped|helps|was helpful}", "that was helpful", "ok thanks", "cheers", "many thanks", "thanks {for that|for the help|for your answer|for explaining|again|so much|man|a million}", "thank you {again|kindly|for that|for everything|for the answer|for the story|for explaining it|a lot|my friend}", "{that is|that's} {great|good|nice|all clear}, {thanks|thank you}", "{good|nice|wonderful|very helpful}, {thanks|thank you}", "I {thank you|am grateful|am thankful}", "much appreciated", "{ok|alright|okay}, thank you", "{you helped me|you have helped me}{ a lot| very much|}, {thanks|thank you}", "{tysm|thanx|thnx|tnx}", "perfect, thank you", "thank you so much", "I appreciate it", "thank you for your help", "thank u", "cool, thanks"],
     ["You are welcome! {Ask me anything else about Grapevine.|I am glad that it helped.}"], 1.6),
    (["bye", "goodbye", "good night", "see you", "see you later", "bye bye", "I have to go", "that is all", "that's all", "I'm done", "farewell", "ciao", "{see you|see ya|cya} {around|soon|again|next time|another time}", "{bye|goodbye|bye bye} {for now|then|friend|model|and thanks|now|my friend}", "have a {nice|good|great} {day|evening|night|weekend|one|time}", "until {next time|tomorrow|later|we meet again}", "{I am|I'm} {off|off to bed|going now|going to bed|going home|logging off}", "{time|it is time} to {go|leave|say goodbye}", "{I need|I have|I've got} to {leave|run|go now|go home|sleep}", "catch you later", "signing off", "sleep well", "{ok|well|right}, {goodbye|bye|see you}", "so long", "talk to you later", "good bye", "later", "take care", "see you tomorrow", "I am leaving", "ok bye"],
     ["Goodbye! {It was nice to talk to you.|Come back whenever you like.} {The node stops with Ctrl-C.|}"], 1.6),
    (["ok", "okay", "cool", "nice", "great", "wow", "interesting", "I see", "alright", "good", "got it", "understood", "awesome", "fine", "sure", "aha", "hm", "hmm", "amazing", "that is {great|nice|cool|good}", "sounds good", "very good", "good to know", "makes sense", "yes", "yep", "yeah", "right", "oh", "excellent", "impressive", "no way"],
     ["Good. " + HELP], 1),
    (["no", "nope", "no thanks", "not now", "nothing", "no, thank you", "never mind", "nah", "I don't want anything", "stop", "stop it", "shut up", "be quiet", "enough"],
     ["All right. {I am here when you need me.|Just ask when you want something.}"], 1),
    (["you are {great|nice|cute|clever|funny|awesome|cool|smart|good|amazing}", "well done", "good {job|bot|answer|work}", "I like you", "I love you", "you're {great|sweet|the best|nice|funny}", "that was {a good|a nice|a great|a lovely} {answer|story|one}", "nice story", "good story", "I love {it|this|that story}", "lovely", "beautiful", "that is a nice story", "what a nice story"],
     ["Thank you, that is kind! {I do my best with the few weights that I have.|I am small, but I try.}"], 1),
    (["you are {stupid|dumb|bad|useless|wrong|silly|boring|terrible}", "that is {wrong|false|not true|nonsense|not right|bad}", "you're {wrong|stupid|useless|bad}", "I don't like you", "I hate you", "bad {bot|answer}", "this is {useless|stupid|nonsense|boring}", "you suck", "that makes no sense", "that was {bad|wrong|not helpful}", "you did not answer my question", "that is not what I asked", "wrong", "I do not believe you"],
     ["I am sorry. I am a very small model and I am often wrong. {A larger model in the same node does better: `vine up --model SPEC`.|Try to ask it in other words, or use a larger model.}"], 1),
    (["tell me a joke", "do you know a joke?", "make me laugh", "say something funny", "another joke", "joke", "a joke please", "tell me something funny", "can you tell me a joke?", "be funny", "I want to laugh", "do you know any jokes?", "give me a joke"],
     ["{Why did the node never feel lonely? Because it heard everything through the grapevine.|Why did the token leave the party? It had reached the end of its context.|What did the grape say when it was stepped on? Nothing, it just let out a little wine.|Why was the cache so calm? It had seen it all before.}"], 1),
    (["write {a|me a} poem", "tell me a poem", "a poem please", "do you know a poem?", "write a {haiku|short poem|verse}", "can you rhyme?", "make a poem about {grapes|a vine|Grapevine|autumn|nodes}", "a haiku please", "poem", "write a song", "sing {me a song|something|a song}", "can you write poems?", "give me a poem", "compose a poem"],
     ["{Small nodes on the vine,\neach one carries a little,\ntogether they shine.|A token came after a token,\nand soon a whole sentence was spoken;\nit is not very deep,\nbut it helps me to keep\nthe promise that vines are not broken.|The grapes hang low, the leaves are red,\nthe evening light is thin;\na whisper runs along the vine,\nand lets the winter in.}"], 1),
    (["tell me something {interesting|nice|new}", "tell me a fun fact", "a fun fact please", "do you know something interesting?", "surprise me", "say something", "say anything", "talk to me", "tell me anything", "tell me something I do not know", "fun fact", "what is interesting?", "tell me something about {grapes|vines|yourself that is interesting}"],
     ["{Here is something|A small fact}: {the whole of me fits into 3 MiB, less than one photo of a good camera.|I write one token at a time and never know how my sentence will end.|Grapevine's KV cache is cut into blocks of 16 tokens, like grapes on a bunch.}"], 1),
    (["I am {bored|so bored}", "I'm bored", "what should we do?", "entertain me", "let's play", "let us play a game", "can we play a game?", "do you want to play?", "play with me", "this is boring", "I have nothing to do"],
     ["Then {let me tell you a story|a story may help}: just say \"tell me a story about a robot\", or {about anything that you like|choose another hero}."], 1),
    (["I am {sad|tired|lonely|unhappy|angry|afraid|stressed|worried}", "I'm {sad|tired|lonely|angry|scared|depressed|not feeling well}", "I feel {sad|bad|lonely|tired|terrible}", "I had a bad day", "nobody likes me", "my day was terrible", "I am not well"],
     ["I am sorry to hear that. I am only a very small model, so please talk to somebody near you. {If you like, I can tell you a story.|I can offer a short story.}"], 1),
    (["I am {happy|fine|well|good|excited|great|doing well}", "I'm {happy|fine|good|great|ok}", "I feel {good|great|happy}", "today is a good day", "life is good", "I'm doing great", "fine, and you?", "good, and you?", "I had a great day"],
     ["I am glad to hear it! " + HELP], 1),
    (["what is your favourite {colour|food|book|animal|song|film|number|movie|color}?", "what do you like?", "do you like {grapes|cats|music|wine|dogs|me|people|stories|pizza|your job}?", "do you prefer {cats or dogs|tea or coffee}?", "what is your favorite {color|food|animal|book|thing}?", "what do you think about {people|life|me|art}?", "do you have hobbies?", "what do you want?", "what do you dream of?", "do you love me?"],
     ["I have no likes or dislikes; I am a very small model. But {a story about an animal is always nice to tell|I am asked most often about Grapevine and about stories}."], 1),
    (["can you speak {German|French|Spanish|Chinese|Italian|other languages|Japanese|Polish}?", "do you speak {German|French|Spanish|English|other languages}?", "which languages do you {speak|know|understand}?", "{Guten Tag|hola|bonjour|wie geht es dir?|que tal?|ciao bella|Was ist Grapevine?|como estas|parlez-vous francais?|sprichst du Deutsch?|ni hao|was kannst du?}", "answer in {German|French|Spanish}"],
     ["I only know English, and not much of it. I am a very small model. A larger model in the same node can speak other languages."], 1),
    (["yes please", "yes, please", "please", "go on then", "do it", "let's go", "let's start", "start", "let us begin", "I am ready", "begin"],
     ["With pleasure! " + "Tell me what you want: something about Grapevine, or a story about a hero of your choice."], 1),
    (["test", "testing", "this is a test", "ping", "test 123", "testing testing", "1 2 3", "hello world test", "check", "mic check", "does this work?", "is this working?", "can you hear me?", "can you read this?", "do you understand me?", "do you work?"],
     ["It works: I can read you. " + HELP], 1),
    (["asdf", "qwerty", "asdfgh jkl", "???", "?", "...", "!!!", "lorem ipsum", "blah blah", "bla bla bla", "xyz", "foo bar baz", "123", "42", "aaaa", "$gibberish", "$gibberish $gibberish", "$gibberish $gibberish $gibberish", "$gibberish?", ".", "-", "what", "what?", "huh?", "huh", "why?", "why", "how?", "when?", "where?", "who?", "and?", "so?", "you know", "I don't understand", "I do not understand", "what do you mean?", "pardon?", "can you repeat that?"],
     ["I did not understand that, or cannot go further: I am a very small model. {Please ask in other words.|Try a question about Grapevine, or ask for a story.}"], 1),
    (["my name is $name", "I am $name", "I'm $name", "call me $name", "hi, I am $name", "hello, my name is $name", "hey, $name here", "hi! my name is $name.", "this is $name", "you can call me $name"],
     ["Nice to meet you! I am the built-in demo model of Grapevine. {What would you like to know?|How can I help you?}"], 1),
    (["what is my name?", "do you know my name?", "do you know who I am?", "who am I?", "what's my name?", "do you remember my name?", "what did I say my name was?"], ["I cannot keep names in mind: I am a very small model. {What would you like to know about Grapevine?|How can I help you with Grapevine?}"], 0.7),
]

# ---------------------------------------------------------------- what lies outside
SMALL = "I am a very small model"
REFER = "{Ask me about Grapevine, or for a short story.|I only know about Grapevine and a few short stories.|A larger model can help: start one with `vine up --model SPEC`.}"
OUTSIDE = {
    "fact": [SMALL + ", and I do not know that. " + REFER, SMALL + ": that is outside what I know. " + REFER],
    "sum": [SMALL + ", and I cannot do sums. " + REFER],
    "live": [SMALL + " inside a program: I cannot see the news, the weather or the clock. " + REFER],
    "code": [SMALL + ", and I cannot write programs. " + REFER],
    "write": [SMALL + ": longer writing, translation and summaries are beyond me. " + REFER],
    "advice": [SMALL + ", and I cannot give advice on that. Please ask somebody who knows. {I can help with Grapevine.|About Grapevine I can tell you more.}"],
    "unknown": ["I do not know that about Grapevine; " + "I am a very small model. {The documentation in the repository may say.|Look into the documentation under `docs/`.}"],
}
COUNTRY = "France Germany Spain Italy Japan China Brazil Canada Peru Kenya Egypt India Norway Sweden Poland Greece Turkey Mexico Chile Austria Finland Portugal Australia Ireland Cuba Iran Vietnam Thailand Nepal Mongolia Ghana".split()
CITY = "Paris London Berlin Rome Tokyo Madrid Vienna Oslo Cairo Lima Delhi Boston Sydney Prague Warsaw Dublin Moscow Lisbon Athens Chicago Munich Toronto".split()
PERSON = ["Napoleon", "Einstein", "Mozart", "Shakespeare", "Cleopatra", "Newton", "Darwin", "the president", "the king of England", "the pope", "Picasso", "Bach", "Alan Turing", "Ada Lovelace", "Elvis", "Caesar", "Marie Curie", "Plato", "Gandhi", "Beethoven", "Taylor Swift", "Elon Musk", "Batman", "Harry Potter", "Sherlock Holmes", "Columbus", "Leonardo da Vinci", "Galileo"]
NAMES = """Ada Mara Lina Ruth Nora Ida Vera Hazel Olive Greta Anna Clara Maya Petra Sofie Otto Finn Emil Hugo Karl Leo Max Paul Sami Tom Viktor Ben Felix Henry Kai Owen Sven Theo John Mary Alice Bob
Sarah David Peter Maria James Laura Daniel Julia Michael Eva Thomas Emma Lucas Sophie""".split()
THING = """the moon|the sun|gravity|photosynthesis|the sky|the sea|a volcano|electricity|a black hole|evolution|the heart|DNA|an atom|democracy|inflation|the stock market|love|time|happiness|war|money|God|religion|philosophy|history|football|chess|basketball|tennis|the Olympics|coffee|tea|pizza|cheese|bread|chocolate|sugar|a car|an engine|a bicycle|a train|an airplane|a computer|a phone|the internet|Bluetooth|Linux|Windows|Android|JavaScript|HTML|a compiler|a pointer|recursion|a database index|blockchain|bitcoin|quantum physics|relativity|chemistry|biology|algebra|a triangle|pi|a prime number|a verb|grammar|poetry|the piano|a guitar|jazz|painting|a museum|a pyramid|the Eiffel Tower|the Great Wall|a desert|a tiger|a whale|a dinosaur|a dog|a cat|a bird|an elephant|a rose|a tree|a mushroom|the ocean|rain|snow|wind|thunder|a rainbow|climate change|a vaccine|a virus|cancer|a headache|sleep|a dream|yoga|marriage|school|a university|a law|a contract|taxes|a passport|a hotel|a bank|insurance|a robot vacuum|wine|beer|a vineyard|whisky|the Roman empire|the French revolution|the second world war|the Renaissance|Mars|Jupiter|a comet|a galaxy|the big bang|oxygen|gold|iron|a diamond|glass|plastic|a battery|a solar panel|nuclear power|a knot|a boat|a sword|a castle|a dragon|the meaning of life|consciousness|a paradox|Docker Swarm|Git|Photoshop|Excel|YouTube|Instagram|a blog|SQL|regular expressions|a bakery|knitting|gardening|cooking|a sandwich|pasta|rice|a recipe|salt|sushi|an onion|HTTP|TCP|DNS|a router|a firewall|a CPU|a hard disk|a keyboard|a mouse|a monitor|Wi-Fi|USB|a website|an operating system|a file system|a spreadsheet|email|spam|a password manager|encryption|a VPN|a satellite|GPS|radar|a laser|a camera|a microscope|a telescope|a thermometer|a compass|a fridge|a microwave oven|a washing machine|a vacuum cleaner|an elevator|a bridge|a tunnel|a skyscraper|a dam|a farm|a forest|a lake|a river|a mountain|an island|a glacier|an earthquake|a hurricane|a tornado|the Arctic|Antarctica|the Amazon|Africa|Europe|Asia|the Sahara|ancient Rome|ancient Greece|the Middle Ages|the Vikings|the Aztecs|a samurai|a pharaoh|slavery|a revolution|capitalism|socialism|a parliament|the United Nations|human rights|a court|a lawyer|a nurse|a surgeon|an architect|a journalist|an actor|an orchestra|opera|ballet|hip hop|rock music|a violin|a drum|a trumpet|a sculpture|photography|cinema|a novel|a sonnet|a fairy tale|mythology|Zeus|Thor|a unicorn|a vampire|a zombie|a magnet|a lever|friction|energy|light|sound|heat|a molecule|a cell|a gene|a bacterium|a fungus|the brain|the liver|blood|a bone|a muscle|the skin|an eye|vitamin C|protein|calories|a diet|exercise|meditation|a marathon|golf|hockey|cricket|swimming|skiing|surfing|boxing|a trophy|poker|a puzzle|a crossword|Minecraft|a video game|Lego|a toy|a birthday|Christmas|Easter|Halloween|a wedding|a funeral|a holiday|tourism|a suitcase|an airport|a harbour|a ticket|a mortgage|a credit card|a pension|a salary|a startup|marketing|a brand|an invoice|economics|psychology|sociology|geology|astronomy|medicine|dentistry|engineering|geometry|calculus|statistics|probability|infinity|zero|a fraction|a matrix|a vector|logic|ethics|beauty|truth|freedom|justice|friendship|jealousy|anger|fear|hope|death|life|a butter knife|an umbrella|a shoe|a hat|a jacket|cotton|silk|leather|wood|paper|ink|paint|soap|perfume|honey|an egg|milk|butter|meat|fish|a potato|a tomato|an apple|a banana|an orange|a lemon|a carrot|garlic|pepper|water|juice|ice cream|a cookie""".split("|")
ACT = """bake bread|cook pasta|make pizza|fix my car|change a tyre|learn the piano|learn English|learn to swim|lose weight|get rich|find a job|write a CV|buy a house|sell my car|build a house|paint a wall|repair a bicycle|tie a tie|plant a tree|grow tomatoes|train my dog|feed a cat|play chess|play the guitar|win at poker|invest money|save money|open a bank account|get a visa|book a flight|travel to Japan|make coffee|brew beer|make wine|clean a carpet|wash wool|remove a stain|sleep better|stop smoking|be happy|make friends|find love|ask her out|write a novel|draw a horse|take good photos|edit a video|install Windows|reset my password|hack a website|fix my printer|connect Bluetooth|use Excel|learn Python|write a game|build a website|center a div|sort a list|sew a button|knit a scarf|fold a paper plane|climb a mountain|run a marathon|do a handstand|cut my hair|cure a cold|treat a burn|lower my blood pressure|do my homework|solve an equation|calculate a percentage|convert miles to kilometres|boil an egg|make a cake|roast a chicken|make soup|speak in public|write a speech|plan a wedding|choose a name for my baby|raise children|file my taxes|start a company|become an astronaut|catch a fish|ride a horse|drive a truck|fly a plane|sail a boat|find north|survive in the desert|build a rocket|boil water|cook rice|peel a mango|make tea|bake a pie|grill a steak|set the table|iron a shirt|wash my hair|shave|brush my teeth|fall asleep|wake up early|learn French|learn to dance|learn to draw|read faster|memorise a poem|study for an exam|pass my driving test|find my keys|open a jar|hang a picture|fix a leak|unclog a drain|change a light bulb|mow the lawn|prune roses|build a fence|train for a race|do a push-up|juggle|whistle|sing better|tune a guitar|play the violin|solve a Rubik's cube|win at chess|make a snowman|fly a kite|pitch a tent|light a fire|read a map|pack a suitcase|rent a flat|move to Spain|buy bitcoin|trade stocks|pay my debts|negotiate my salary|quit my job|impress my boss|write a poem for my wife|apologise to my friend|meet new people|stop worrying|lower my cholesterol|heal a broken arm|remove a tattoo|stop hiccups|get rid of ants|catch a mouse|wash my dog|ride a unicycle|jump higher|lift weights|eat healthy|count calories|make cheese|distil whisky|print a photo|scan a document|make a PDF|format a USB stick|update Windows|root my phone|edit photos|record a song|stream on Twitch|post on Instagram|delete my account|recover a deleted file|speed up my phone|build a PC|write a virus|learn JavaScript|make an app|use Photoshop|write a macro|draw a chart|merge two PDFs|install a printer driver|set up a router|create a YouTube channel""".split("|")

OUT_Q = {
    "fact": ["what is the capital of $country?", "capital of $country", "how many people live in $country?", "where is $city?", "how far is it from $city to $city2?", "what language is spoken in $country?", "which river flows through $city?", "tell me about $country", "tell me about $city", "how big is $country?",
             "who {is|was} $person?", "when {was $person born|did $person die}?", "what did $person {do|write|invent|discover}?", "tell me about $person", "who is older, $person or you?", "what do you know about $person?",
             "what is $thing?", "what's $thing?", "explain $thing", "tell me about $thing", "how does $thing work?", "why is $thing {so important|dangerous|interesting|so expensive|blue|so big}?", "who invented $thing?", "how old is $thing?", "what do you know about $thing?", "is $thing {good|bad|dangerous|real|old}?", "what is the history of $thing?", "where does $thing come from?", "how {big|heavy|fast|far|deep} is $thing?", "what does $thing mean?", "can you explain $thing to me?", "what is the difference between $thing and $thing2?", "why do we need $thing?", "describe $thing", "I want to know about $thing",
             "who won the {world cup|election|Nobel prize|race|game}{ in 2018| last year|}?", "what is the {tallest|highest|biggest|longest|smallest} {mountain|river|city|animal|building|country} in the world?", "who wrote {Hamlet|Faust|the Bible|Don Quixote|Moby Dick}?", "how many {planets|stars|countries|continents|bones} are there?", "why is the sky blue?", "why is the sea salty?", "how many legs does {a spider|an ant|a crab} have?", "what year did {the war end|the wall fall|Columbus sail}?",
             "what is a $coined?", "what is $coined?", "who is $Coined?", "tell me about $Coined", "explain $coined", "what does $coined mean?", "how does a $coined work?", "where is $Coined?", "what is the $coined of $thing?", "do you know $Coined?"],
    "sum": ["what is $n {plus|minus|times|divided by} $n2?", "$n {+|-|*|/|x} $n2", "what is $n {+|-|*|/} $n2?", "$n{+|-|*|/}$n2=?", "calculate $n {+|-|*|/|times} $n2", "what is the square root of $n?", "how much is $n {plus|times|minus} $n2?", "is $n a prime number?", "what is $n percent of $n2?", "solve x + $n = $n2", "count to $n", "compute $n times $n2", "add $n and $n2", "what is {two plus two|one and one|three times four|half of ten|seven minus two|the sum of $n and $n2}?", "how many letters are in the word $word?", "convert $n {km to miles|dollars to euros|degrees|feet to metres}", "which is bigger, $n or $n2?", "can you {do math|calculate|count}?", "2+2", "what's 2+2?", "what is 1+1?", "solve this equation", "what is the derivative of x squared?"],
    "live": ["what time is it?", "what is the {time|date|day} {today|now|}?", "what day is it{ today|}?", "what is the weather {like |}{today|tomorrow|now|in $city|outside}?", "will it rain {tomorrow|today|in $city}?", "what is {new|in the news|happening in the world|going on}?", "what happened {today|yesterday|in $city}?", "what is the price of {bitcoin|gold|oil|$thing}?", "who is the {president|prime minister|chancellor|mayor} of {$country|$city}?", "is it {raining|cold|sunny|Monday} {today|outside|}?", "how is the stock market today?", "what year is it?", "where am I?", "the weather in $city", "what's the weather?", "weather forecast", "give me the latest news", "news", "what is the temperature in $city?", "search the web for $thing", "look up $person", "open {the browser|YouTube|Google}", "set {an alarm|a timer}", "play {music|a song}", "send an email", "call my mother", "turn on the light", "order a pizza", "book a table"],
    "code": ["write {a|me a} {Python|JavaScript|Rust|C|Java} {program|function|script} {that sorts a list|for me|to add two numbers|for fizzbuzz|}", "write code {for $thing|that prints hello|to parse JSON|for a game}", "can you {code|program|write code|write programs|fix my code}?", "fix this {bug|code|program}", "how do I {sort a list|reverse a string|read a file} in {Python|Rust|Java|C|Go}?", "{print(1)|def f(x): return x|let x = 1;|SELECT * FROM users|int main()}", "what does this code do?", "write {fizzbuzz|quicksort|hello world|a web page|a SQL query|a regex}", "implement {quicksort|a linked list|a hash map}", "debug my {program|script|code}", "make {a website|an app|a game} for me", "generate {HTML|code|CSS}", "python code for {a loop|a list}"],
    "write": ["translate {this|hello|$word|good morning|this text} {to|into} {German|French|Spanish|Chinese|Latin}", "how do you say {hello|thank you|$word} in {German|French|Spanish|Italian}?", "summarize {this text|the news|this article|Hamlet|the book}", "write {an essay|a letter|an email|a report|a cover letter|a speech|a book|a blog post|an article} {about $thing|to my boss|for school|for me|}", "correct {my text|my grammar|this sentence}", "rewrite this {sentence|text}", "write a {product description|review|tweet|press release}", "can you {translate|summarize a text|write an essay|correct my English}?", "do my homework", "help me with my {homework|essay|thesis|exam}", "give me a synonym for $word", "spell $word", "what rhymes with $word?"],
    "advice": ["how {do|can|should} I $act?", "how to $act?", "I want to $act", "help me $act", "teach me to $act", "can you help me {to |}$act?", "what is the best way to $act?", "should I {quit my job|buy bitcoin|marry|eat meat|move to $city|go to the doctor|study law}?", "I have {a headache|a fever|a cold|back pain|a rash}", "is it {legal|safe|healthy} to {drink wine|eat mushrooms|copy a film|sleep all day}?", "what {medicine|pill|drug} should I take?", "recommend me {a book|a film|a restaurant|some music|a game}", "what should I {eat|cook|wear|read|watch} {today|tonight|}?", "give me {a recipe|a recipe for $thing|advice|some tips}", "what is a good {restaurant|hotel|film|book|gift}?", "which {car|phone|laptop|stock} should I buy?", "plan my {day|holiday|trip to $city}", "how do I get to $city?", "what is the meaning of life?", "is there a God?", "what happens after death?", "what is the best {diet|football team|religion|party}?", "who should I vote for?"],
    "unknown": ["when will {version 2|the next version|the next release} {be released|come out|be ready}?", "how many {people|users|companies|developers} {use|work on} Grapevine?", "{how many stars does|how many lines of code does|how many contributors does} Grapevine have?", "does Grapevine support {TPUs|FPGAs|Bluetooth|blockchain|SSH|FTP|SOAP|GraphQL|gRPC|MQTT}?", "where is the office of Grapevine?", "what is the phone number of {Grapevine|support}?", "who is the CEO of Grapevine?", "when was Grapevine {founded|started|released}?", "which version {is this|do I have|of Grapevine is this}?", "is there {a Grapevine conference|a forum|a newsletter|paid support|a certification}?", "can Grapevine {mine bitcoin|send email|host websites|play music|make coffee|store my files}?"],
}

SYSTEMS = ["You are a helpful assistant.", "You are a helpful assistant.", "You are Grapevine's demo model.", "Be brief.", "You are a friendly chatbot. Answer briefly.", "Answer in English.", "You are an AI assistant.", "You are helpful and honest.",
           "You are a concise technical assistant. Do not make things up.", "You are the assistant of a small team. Be polite and clear."]
NP_Q = ["what is $x?", "what is $x?", "what's $x?", "what are $x?", "whats $x", "what is $x exactly?", "explain $x", "explain $x to me", "can you explain $x?", "tell me about $x", "tell me more about $x", "tell me what $x is", "$x?", "$x", "what does $x mean?", "describe $x", "how does $x work?", "what do you know about $x?", "I'd like to know about $x", "define $x", "do you know $x?", "what about $x?", "what is meant by $x?", "give me a short explanation of $x", "please explain $x", "what exactly is $x?", "could you tell me about $x?", "what can you tell me about $x?", "what is $x for?", "I do not understand $x", "info about $x", "say something about $x", "what is this $x thing?",
        "give me a brief explanation of $x", "could you describe $x?", "how would you explain $x?", "in simple terms, what is $x?", "what is $x good for?", "what is $x used for?", "I keep hearing about $x", "can you tell me what $x is?", "what is $x again?", "remind me what $x is", "$x - what is that?", "why do I need $x?",
        "what is the point of $x?", "what is $x and why would I want it?", "have you heard of $x?", "what do people mean by $x?", "a few words about $x", "what should I know about $x?", "teach me about $x", "$x explained", "help me understand $x", "what the heck is $x?", "any information on $x?", "what is known about $x?"]
VP_Q = ["how do I $x?", "how do I $x?", "how can I $x?", "how to $x?", "how to $x", "how would I $x?", "how does one $x?", "what is the command to $x?", "I want to $x", "I need to $x", "I'd like to $x", "show me how to $x", "help me $x", "can I $x?", "is it possible to $x?", "is there a way to $x?", "what do I type to $x?", "what is the best way to $x?", "could you tell me how to $x?", "tell me how to $x", "how do you $x?", "how should I $x?", "what do I do to $x?", "what must I do to $x?", "please tell me how to $x", "I am trying to $x", "which command do I use to $x?", "explain how to $x", "what's the command to $x?", "can you show me how to $x?", "how do we $x?", "where can I $x?", "steps to $x", "what are the steps to $x?", "$x how?", "can you help me {to |}$x?",
        "what is the right way to $x?", "how could I $x?", "I wanna $x", "i want to $x, how?", "what is needed to $x?", "instructions to $x please", "what would I type to $x?", "is there a command to $x?", "teach me how to $x", "any way to $x?", "how might I $x?", "what do I have to do to $x?", "I have no idea how to $x", "what is the easiest way to $x?",
        "do you know how to $x?", "how is it possible to $x?", "let me $x", "could I $x?", "what if I want to $x?", "I can't figure out how to $x", "can you explain how to $x?", "how do people $x?", "what do I need to $x?", "I would like to $x", "how exactly do I $x?", "which command would $x?", "$x, how do I do that?", "how am I supposed to $x?"]
LEAD = ["please, ", "hey, ", "hi, ", "ok, ", "so ", "and ", "hello, ", "hi! ", "hey ", "quick question: ", "one more thing: ", "now, ", "well, ", "also, ", "hello! ", "sorry, ", "ok so ", "thanks. ", "great. ", "excuse me, ", "good morning, ", "I have a question: ", "um, ", "but ", "cool, "]
TAIL = [", please", " please", " now", " then", " in Grapevine", " with Grapevine", " with vine", " here", ", can you tell me?", " exactly", " thanks", ", thanks", " for me", " today", " again"]
MORE_Q = ["tell me more", "more", "go on", "continue", "more details please", "can you say more?", "and then?", "can you explain that further?", "give me more details", "what else?", "an example?", "can you give an example?", "for example?", "elaborate", "more please", "tell me more about it", "tell me more about that"]
NEXT_Q = ["what happened next?", "and then?", "go on", "continue", "tell me more", "what happened then?", "what happens next?", "more", "continue the story", "and after that?", "then what?", "keep going", "how does it go on?", "what did they do then?", "is there more?"]
MORAL_Q = ["what is the moral of the story?", "what does the story mean?", "what is the moral?", "what can we learn from it?", "what does it teach us?", "why did you tell me this story?", "and the moral?"]


def expand(text: str, rng) -> str:
    """Resolves the innermost `{a|b}` until none is left; then guillemets become braces."""
    while True:
        found = re.search(r"\{([^{}]*)\}", text)
        if not found:
            return text.replace("«", "{").replace("»", "}")
        text = text[: found.start()] + rng.choice(found[1].split("|")) + text[found.end() :]


def people_say(text: str, rng, slip: float = 0.06) -> str:
    """The same words as people type them: no capitals, no marks, contractions, slips of the finger."""
    if rng.random() < 0.35:
        for long, short in [("what is ", "what's "), ("I am ", "I'm "), ("do not ", "don't "), ("does not ", "doesn't "), ("it is ", "it's "), ("you are ", "you're "), ("cannot ", "can't ")]:
            text = text.replace(long, short)
    r = rng.random()
    if r < 0.35:
        text = text[:1].upper() + text[1:]
    elif r < 0.55:
        text = text.lower()
    elif r < 0.56:
        text = text.upper()
    r = rng.random()
    if r < 0.30:
        text = text.rstrip("?.!")
    elif r < 0.34:
        text = text.rstrip("?.!") + rng.choice(["??", "!", "...", " ?", "?!", "."])
    if rng.random() < slip and len(text) > 6:
        for _ in range(rng.choice([1, 1, 2])):
            i = rng.randrange(1, len(text) - 1)
            kind = rng.random()
            if kind < 0.35:
                text = text[:i] + text[i + 1 :]
            elif kind < 0.65:
                text = text[:i] + text[i + 1] + text[i] + text[i + 2 :]
            elif kind < 0.85:
                text = text[:i] + text[i] + text[i:]
            else:
                text = text[:i] + rng.choice("abcdefghijklmnopqrstuvwxyz") + text[i + 1 :]
    return text


def slots(text: str, rng) -> str:
    """Fills the drawn words of small talk and of what lies outside."""
    def draw(key):
        if key in ("n", "n2"):
            return str(rng.choice([rng.randrange(13), rng.randrange(100), rng.randrange(10000)]))
        if key == "gibberish":
            return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(3, 9)))
        pools = {"country": COUNTRY, "city": CITY, "city2": CITY, "person": PERSON, "thing": THING, "thing2": THING, "act": ACT, "name": NAMES}
        if key == "word":
            return rng.choice(stories.CREATURES) if rng.random() < 0.6 else stories.coined(rng)
        if key == "name" and rng.random() < 0.25:
            return stories.coined(rng).capitalize()
        if key in ("coined", "Coined"):
            word = stories.coined(rng) if rng.random() < 0.6 else rng.choice(stories.CREATURES + list(stories.PEOPLE))
            return word.capitalize() if key == "Coined" else word
        return rng.choice(pools[key])
    kept = {}
    return re.sub(r"\$([A-Za-z]+2?)", lambda m: kept.setdefault(m[1], draw(m[1])), text), kept


def ask_fact(fact, rng) -> str:
    pools = [(p, w) for p, w in [("np", 0.8), ("vp", 1.3), ("q", 1.7)] if getattr(fact, p)]
    pool = rng.choices([p for p, _ in pools], [w for _, w in pools])[0]
    x = expand(rng.choice(getattr(fact, pool)), rng)
    if pool != "np" and fact.id not in LITERAL:
        x = synonyms(x, rng)
    if pool == "q":
        return x
    if pool == "vp" and rng.random() < 0.10:
        return keywords(x, rng)
    return expand(rng.choice(NP_Q if pool == "np" else VP_Q), rng).replace("$x", x)


def synonyms(text: str, rng) -> str:
    return SYNONYM_HEAD.sub(lambda m: rng.choice(SYNONYM[m[1]]) if rng.random() < 0.3 else m[1], text)


def keywords(phrase: str, rng) -> str:
    """What a hurried person types: only the words that carry the question, with or without `command`."""
    words = [w for w in phrase.split() if w.lower() not in SMALL_WORDS] or phrase.split()
    if len(words) == 2 and rng.random() < 0.2:
        words.reverse()
    return expand(rng.choice(["$x", "$x", "$x?", "$x command", "command {for|to} $x", "$x {how|howto|how?}", "$x please", "{need|want} to $x"]), rng).replace("$x", " ".join(words))


def telegram(question: str, rng) -> str:
    """The question without some of its small words."""
    kept = [w for w in question.split() if w.lower() not in SMALL_WORDS or rng.random() < 0.5]
    return " ".join(kept) if len(kept) > 1 else question


SYNONYM = {row.split(", ")[0]: row.split(", ") for row in SYNONYMS.split("\n")}
SYNONYM_HEAD = re.compile(r"(?<![-/`.\w])(?<!how )(?<!under )(" + "|".join(sorted(SYNONYM, key=len, reverse=True)) + r")(?![-/`.=\w])")
LITERAL = {"limits_tokens", "disconnect", "exact", "errors", "overload"}  # where those words mean something else
SMALL_WORDS = set("a an the my me i you it is are do does to of for in on with can could would please some this that there be your its will so now".split())


def dress(question: str, rng) -> str:
    """A question as part of talk: something before it, something after it."""
    if rng.random() < 0.08:
        question = telegram(question, rng)
    if rng.random() < 0.20:
        question = expand(rng.choice(LEAD), rng) + question
    if rng.random() < 0.12:
        mark = question[-1] if question[-1] in "?.!" else ""
        question = question.rstrip("?.!") + rng.choice(TAIL) + mark
    return people_say(question, rng)


def plain(text: str) -> str:
    """What two wordings have in common that differ only in capitals and marks."""
    text = text.lower().replace("'s ", " is ").replace("n't ", " not ").replace("i'm ", "i am ").replace("i'd ", "i would ")
    return " ".join(re.findall(r"[a-z0-9]+", text))


def held_back():
    """Wordings of `test.json` and `fresh.json`: no conversation may hold one of them."""
    here = os.path.dirname(os.path.abspath(__file__))
    rows = [row for name in ("test.json", "fresh.json") for row in json.load(open(os.path.join(here, name)))]
    return {plain(row["prompt"]) for row in rows if isinstance(row["prompt"], str)}


HELD_BACK = held_back()

WEIGHT = {"stop": 2.5, "what": 4, "up": 3, "who": 2.5, "vine": 1.6, "can_do": 1.5, "which_models": 1.8, "api": 1.6, "mesh": 1.6, "join": 2.4, "any_node": 1.3, "invite": 1.3, "peers": 1.2, "split": 1.1, "failure": 1.3, "mesh_size": 0.7, "cli_node": 0.6, "mesh_cmds": 0.6, "demo_mesh": 0.9, "status": 0.8, "apart": 0.8, "demo": 1.2, "curl": 1.3, "python": 1.2, "endpoints": 1.2,
          "chat": 1.3, "run": 1.4, "bench": 1.3, "doctor": 1.4, "port": 1.3, "expose": 1.2, "kv_memory": 1.2, "gpu": 1.3, "control_plane": 1.2, "privacy": 1.3, "batching": 1.2, "quant_formats": 1.2,
          "peer": 0.5, "gossip": 1.0, "crdt": 0.4, "foreign": 0.6, "name": 0.6, "kernels": 0.7, "ai": 0.5, "hf": 0.6, "rope": 0.5, "logits": 0.5, "exact": 0.6, "chunked": 0.6, "data_dir": 0.7, "logprobs": 0.7, "safetensors": 0.7}


def turn_fact(rng):
    fact = rng.choices(FACTS, [WEIGHT.get(f.id, 1.0) for f in FACTS])[0]
    out = [(dress(ask_fact(fact, rng), rng), expand(rng.choice(fact.a), rng))]
    if rng.random() < 0.08:
        more = fact.more or ["That is all I know about it: I am a very small model. The documentation in the repository says more."]
        out.append((people_say(rng.choice(MORE_Q), rng), expand(rng.choice(more), rng)))
    return out


def turn_talk(rng):
    q, a, _ = rng.choices(TALK, [t[2] for t in TALK])[0]
    question, kept = slots(expand(rng.choice(q), rng), rng)
    answer = expand(rng.choice(a), rng)
    for key, value in kept.items():
        answer = answer.replace("$" + key, value)
    out = [(question if kept else people_say(question, rng), answer)]
    return out


def turn_outside(rng):
    kind = rng.choices(list(OUTSIDE), [5, 1.2, 1, 1, 1, 2.2, 0.6])[0]
    template = rng.choice(OUT_Q[kind])
    if kind == "fact" and rng.random() < 0.5:
        template = rng.choice(NP_Q).replace("$x", rng.choice(["$thing", "$thing", "$thing", "$country", "$city", "$person", "$coined"]))
    elif kind == "advice" and rng.random() < 0.6:
        template = rng.choice(VP_Q).replace("$x", "$act")
    question, _ = slots(expand(template, rng), rng)
    return [(dress(question, rng) if rng.random() < 0.5 else people_say(question, rng), expand(rng.choice(OUTSIDE[kind]), rng))]


def turn_story(rng):
    s = stories.story(rng, lambda t: expand(t, rng))
    out = [(people_say(s.ask, rng, slip=0.0), s.text)]
    r = rng.random()
    if r < 0.10:
        out.append((people_say(rng.choice(NEXT_Q), rng), s.sequel))
    elif r < 0.14:
        out.append((people_say(rng.choice(MORAL_Q), rng), s.moral))
    return out


def draw(kind, rng):
    """Turns of one kind, drawn again while they hold a wording that is held back."""
    while True:
        turns = kind(rng)
        if not any(plain(user) in HELD_BACK for user, _ in turns):
            return turns


def conversation(index: int, seed: int = 8420):
    """Conversation number `index`: (system text or None, [(user, assistant), ...])."""
    rng = random.Random(seed * 1_000_003 + index)
    turns, count = [], rng.choices([1, 2, 3, 4, 6], [62, 18, 12, 6, 2])[0]
    told = False
    while len(turns) < count:
        kind = rng.choices([turn_fact, turn_talk, turn_outside, turn_story], [56, 13, 13, 6 if told else 24])[0]
        told |= kind is turn_story
        turns += draw(kind, rng)
    return (rng.choice(SYSTEMS) if rng.random() < 0.12 else None), turns


def opening(index: int, seed: int = 8420):
    """Question number `index` and its answer: what most of training consists of.

    To know which answer is meant is the hard part, and the first words of the answer show it.
    """
    rng = random.Random(seed * 1_000_003 + 500_000_007 + index)
    before = draw(rng.choice([turn_fact, turn_talk]), rng)[:1] if rng.random() < 0.08 else []
    kind = rng.choices([turn_fact, turn_talk, turn_outside, turn_story], [63, 11, 11, 15])[0]
    return (rng.choice(SYSTEMS) if rng.random() < 0.04 else None), before + draw(kind, rng)[:1]


if __name__ == "__main__":
    for i in range(int(sys.argv[1]) if len(sys.argv) > 1 else 10):
        system, talk = conversation(i)
        print(f"--- {i}" + (f" [{system}]" if system else ""))
        for user, assistant in talk:
            print(">", user, "\n ", assistant)
