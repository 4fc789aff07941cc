"""Everyday English words, by what they can stand for in a sentence: the vocabulary of the tiny LLaMA.

The small world (world.py) needs only a few of them. The tiny LLaMA reads them all (corpus.py), so that
adapters can also learn the answers of a user's own data: "a brown dog", "in the kitchen".
"""

COLORS = "red yellow green blue purple black orange pink brown white gray gold silver violet".split()
SHAPES = ("circle square triangle star cross heart rectangle oval diamond arrow moon ring line dot cube "
          "hexagon").split()
SIZES = "big small large little tiny huge tall short long wide".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve twenty hundred".split()
ANIMALS = ("dog cat horse cow lion bear sheep pig duck hen goose bird fish mouse rabbit fox wolf deer tiger "
           "elephant monkey giraffe zebra camel snake frog turtle whale shark bee ant fly beetle spider worm "
           "butterfly eagle owl parrot robin penguin goat donkey squirrel puppy kitten kangaroo").split()
PEOPLE = ("man woman boy girl child baby teacher doctor baker farmer cook judge actor sailor pilot clerk "
          "king queen nurse driver player singer dancer painter student mother father sister brother friend "
          "soldier worker police").split()
FOOD = ("apple banana lemon grape cherry orange pear bread cheese egg cake pizza sandwich soup rice meat "
        "salad tomato carrot potato onion milk tea juice coffee water chocolate sugar salt butter cookie "
        "corn bean nut honey ice").split()
OBJECTS = ("ball kite book cup hat box doll bag car bus train truck bike boat ship plane hammer saw drill "
           "wrench shirt coat sock dress shoe glove scarf chair table bed desk sofa lamp clock door window "
           "piano drum flute violin guitar pen pencil paper key phone computer camera watch bottle glass "
           "plate bowl fork knife spoon pot basket umbrella flag coin candle mirror blanket pillow rope "
           "ladder bench fence wheel bell ticket letter map picture photo toy balloon flower tree leaf "
           "grass stone rock cloud sun star brush broom towel soap ring crown sword tent sign light wall "
           "floor roof engine robot helmet skateboard").split()
PLACES = ("park street house garden kitchen school beach forest field farm city room office shop market "
          "hospital station airport zoo river lake mountain sea ocean desert jungle pond nest hive bakery "
          "court theater village road bridge castle church museum library restaurant playground snow sky "
          "sand yard pool hotel bathroom bedroom country island hill").split()
ADJECTIVES = ("old new young happy sad hot cold warm cool fast slow strong weak wet dry soft hard dark clean "
              "dirty empty full rich poor late early open closed quiet loud high low heavy round flat "
              "sharp sweet sour good bad nice pretty beautiful funny angry tired hungry brave kind clever "
              "busy lazy quick bright thin thick deep cheap wild fresh wooden metal plastic striped "
              "broken ready safe").split()
DOING = ("running walking sitting standing sleeping eating drinking playing jumping flying swimming reading "
         "writing singing dancing cooking riding driving climbing looking smiling laughing crying talking "
         "waiting working lying holding carrying throwing catching painting washing cutting pulling pushing "
         "fishing resting barking hiding").split()
VERBS = ("go see eat run come give take make sing write drink know tell find sleep swim jump walk play read "
         "sit stand fly ride drive climb look smile laugh cry talk wait work hold carry throw catch wash cut "
         "pull push like love want need have use buy sell open close help show ask answer think say put get "
         "keep turn stop start call move live bring hear feel learn draw paint count name point "
         "describe choose").split()
PAST = ("went saw ate ran came gave took made sang wrote drank knew told found slept swam jumped walked "
        "played read sat stood flew rode drove looked smiled waited worked held carried threw caught bought "
        "sold opened closed helped asked answered said put kept lost liked loved wanted had was were left "
        "met brought heard felt").split()
NAMES = ("Tom Ann Ben Eva Sam Mia Max Zoe Leo Amy Dan Kim Tim Ida Bob Sue Jim Eve Joe Liz Roy May").split()
TIME = ("today yesterday tomorrow now morning evening night day week year summer winter spring autumn "
        "Monday Friday Sunday always never often sometimes soon again").split()
BODY = "head hand foot eye ear nose mouth arm leg hair face tail wing feet teeth tooth hands eyes".split()
PLACED = ("left right top bottom middle above below under over behind beside near between inside outside "
          "front back up down on in at").split()
FUNCTION = ("a an the and or but not no yes is are was were be been it its he she they we you I his her "
            "their my your our him them me us this that these those there here of to from with without for "
            "by as than then so if when while because who what which where how why do does did can could "
            "will would should may must has have had more most less least fewest many much some any all "
            "both each every other another same different only also too very just about after before "
            "first second third last next into out off through during around across against along like "
            "one ones thing things something nothing everything someone nobody kind group word words list "
            "number color colors shape size picture image sentence question name names part place people "
            "animal food object true false right wrong plus minus made called seen sits stands looks "
            "wears holds lives goes has says plays eats likes see tell please find bigger smaller "
            "longer shorter taller faster better best largest smallest opposite plural past tense young "
            "capital legs means comes shows shapes makes works home own belong "
            "job jobs property matter tells takes room corners numbers adds subtracts alike sorted groups "
            "opposites antonyms whose meanings contrary verb noun already happened animals insects spiders "
            "mammals depend habitat gives living needs city country government sits measurement").split()
STARTS = ("The A An It In On At There This That These Those Yes No He She They We You I What Which Where Who "
          "How When Why Is Are Was Do Does Did Can Could Would Will Describe Tell Name Say Look Write List "
          "Answer Give Find Choose Read Count Seen From One Two Three Four Five Six Seven Eight My Your Its "
          "His Her Some All Here Please Not Out If As With For And But Today Yesterday Use "
          "Another To Color Size Every Directions People Many Things Opposites Insects").split()

NOUNS = sorted({*ANIMALS, *PEOPLE, *FOOD, *OBJECTS})
CONTENT = sorted({*COLORS, *SHAPES, *SIZES, *NUMBERS, *NOUNS, *PLACES, *ADJECTIVES, *DOING, *VERBS, *PAST,
                  *NAMES, *TIME, *BODY, *PLACED})
UNCOUNTED = {"bread", "cheese", "soup", "rice", "meat", "salad", "milk", "tea", "juice", "coffee", "water",
             "chocolate", "sugar", "salt", "butter", "corn", "honey", "ice", "paper", "grass", "soap", "snow",
             "sand", "police", "coal", "light", "glass"}
