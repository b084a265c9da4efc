"""The template grammar of synthetic sentences: everyday remarks and requests to an assistant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random


def expand(template: str, grammar: Mapping[str, Sequence[str]], draw: Random) -> str:
    """Replace every {symbol} by one of its phrases until none is left."""
    while "{" in template:
        template = re.sub(r"\{(\w+)\}", lambda found: draw.choice(grammar[found[1]]), template)
    return " ".join(template.split())


def rules(**symbols: str) -> dict[str, tuple[str, ...]]:
    """Each symbol's phrases, written `one | another`; a {symbol} inside stands for its phrases."""
    return {
        symbol: tuple(" ".join(phrase.split()) for phrase in choices.split("|"))
        for symbol, choices in symbols.items()
    }


# What follows an `a` starts with a consonant, and verbs agree with every subject of their slot.
GRAMMAR = rules(
    everyday="""
    {someone} {ate} {food} {past} | {someone} {moved} {thing} {where} | {someone} {went} {past}
    | {someone} {changed} {thing} {past} | {someone} {went} with {companion} | {someone} {felt}
    {feeling} {past} | {someone} {felt} {feeling} because {someone} {happened} | {past}
    {someone} {moved} {thing} {where} | {past} {someone} {went} | the {temper} {animal} {acted}
    {where} | there was a {temper} {animal} {where} | there was a {quality} {object} {where} |
    there were {many} {animals} {where} | {number} {quality} {objects} were {where} | {subject}
    {modal} {task} {future} | {future} {subject} {modal} {task} | {someone} {intended} {task} |
    do you want to {task} {future} | please do not forget to {task} | it was {weather} {past} |
    it will be {weather} {future} | why did {companion} {act} {past} | did {companion} {task}
    {past} | how can {companion} {task} | {someone} asked {companion} to {task} | {someone}
    told {companion} that {someone} {happened} | the {colour} {object} belongs to {companion} |
    how much does the {quality} {object} cost | my {relative} {likes} {activity} {often} |
    {someone} could not find {thing} {where} | {someone} {changed} {thing} and {went} | when
    {someone} {happened} {someone} {went} | i think that {companion} {happened} {past} | {food}
    {tasted} better with {food} | the {site} {nearby} was {full} {past} | let us {task}
    {future} | {activity} makes {companion} {feeling} | is {thing} still {where} | where did
    {companion} put {thing} {past} | {someone} bought a {quality} {object} for {companion} |
    the {quality} {object} was {colour} and {material} | {someone} {waited} for {companion}
    {where} | {someone} never {happened} | {number} of the {animals} {acted} {where} | who
    {changed} {thing} {past} | nobody {happened} {past}
    """,
    someone="i | we | they | he | she | you | {companion} | {companion} | {companion}",
    subject="i | we | they | he | she | you | {companion}",
    companion="""
    my {relative} | our {relative} | her {relative} | his {relative} | the {worker} | our
    {worker} | my {relative} and the {worker} | the {temper} {worker} | a {worker} | the
    {worker} next door
    """,
    relative="""
    mother | father | sister | brother | daughter | son | wife | husband | cousin | grandmother
    | grandfather | nephew | niece | friend | neighbour | uncle | aunt | family
    """,
    worker="""
    teacher | farmer | baker | doctor | nurse | driver | gardener | painter | singer | lawyer |
    carpenter | plumber | waiter | student | sailor | pilot | dentist | tailor | butcher |
    writer | cleaner | builder | soldier | musician | manager | librarian | fisherman |
    journalist | photographer | mechanic | secretary | scientist
    """,
    ate="""
    ate | cooked | ordered | bought | shared | tasted | enjoyed | prepared | wanted | served |
    finished | refused | tried | brought
    """,
    food="""
    fresh bread | hot soup | chicken and rice | apple cake | cold pizza | fried eggs | roast
    potatoes | green salad | chocolate ice cream | pasta with cheese | grilled fish |
    strawberry jam | pancakes with honey | mashed carrots | tomato sauce | a ham sandwich | a
    cup of coffee | black tea | lemon biscuits | a bowl of cereal | cherry pie | peanut butter
    | garlic mushrooms | beef stew | boiled beans | orange juice | vanilla yogurt | a slice of
    melon | spicy noodles | warm milk | onion rings | buttered toast | a plate of sausages |
    blueberry muffins | steamed vegetables
    """,
    tasted="went | tasted | looked | smelled",
    moved="""
    left | put | found | dropped | hid | saw | lost | kept | placed | noticed | forgot | threw
    | carried | discovered | pushed | stored
    """,
    changed="""
    cleaned | repaired | sold | broke | painted | washed | borrowed | opened | closed |
    measured | packed | replaced | returned | emptied | wrapped | polished | covered |
    photographed
    """,
    thing="""
    the {object} | the {object} | the {quality} {object} | the {colour} {object} | my {object}
    | her {object} | his {object} | our {object} | a {quality} {object} | the {material}
    {object} | {number} {objects} | the {objects}
    """,
    object="""
    book | table | lamp | bicycle | key | bottle | camera | mirror | box | coat | ladder |
    clock | window | letter | guitar | blanket | basket | hammer | ticket | painting | radio |
    pillow | candle | wallet | suitcase | bucket | carpet | kettle | drawer | curtain |
    newspaper | telephone | piano | helmet | shovel | tent | vase | jacket | necklace | map
    """,
    objects="""
    books | chairs | glasses | shoes | plates | boxes | keys | flowers | letters | bottles |
    tools | pictures | tickets | candles | boots | stamps | coins | bags | toys | cups |
    pencils | socks | gloves | blankets | magazines | buttons | forks | records
    """,
    material="""
    wooden | metal | plastic | leather | glass | paper | cotton | silver | golden | rubber
    """,
    quality="""
    big | small | heavy | dirty | broken | new | little | large | round | strange | beautiful |
    cheap | dusty | famous | lovely | modern | narrow | quiet | rusty | shiny | soft | tall |
    tiny | useful | wet | plain | pretty | short | long | smooth | special | simple | spare |
    thick | thin
    """,
    temper="""
    young | friendly | clever | lazy | hungry | nervous | gentle | brave | funny | lonely |
    quiet | tall | curious | patient | polite | shy | strong | slim | noisy | sleepy | gloomy |
    cheerful | famous
    """,
    colour="""
    red | blue | green | yellow | white | black | brown | grey | purple | pink | dark | bright
    """,
    number="""
    two | three | four | five | six | seven | eight | nine | ten | twelve | twenty | thirty
    """,
    many="{number} | many | several | some | no | hardly any",
    animal="""
    dog | cat | horse | rabbit | bird | mouse | sheep | goat | duck | fox | lion | tiger |
    monkey | turtle | squirrel | pony | kitten | donkey | wolf | bear | pigeon | frog |
    hedgehog | parrot | snake
    """,
    animals="""
    dogs | cats | horses | rabbits | birds | mice | goats | ducks | foxes | lions | tigers |
    monkeys | turtles | squirrels | ponies | kittens | donkeys | wolves | bears | pigeons |
    frogs | parrots | cows | bees | spiders
    """,
    acted="""
    slept | played | waited | jumped | ran | hid | rested | barked | sat quietly | looked for
    food | walked slowly | turned around | drank some water | rolled over | made a loud noise |
    stood still
    """,
    where="""
    in the garden | on the table | under the bed | behind the house | near the river | by the
    window | next to the door | in the kitchen | on the roof | at the station | in front of the
    school | between the trees | in the corner | beside the road | along the beach | inside the
    garage | on the top shelf | at the bottom of the stairs | outside the church | across the
    street | above the fireplace | in the park | at the office | below the bridge | on the old
    farm | in the attic | against the wall | near the fountain | in the back of the car | at
    the edge of the forest
    """,
    nearby="""
    near the river | by the station | next to the school | beside the road | across the street
    | at the edge of the forest | behind the church | below the bridge | in the old town | on
    the hill
    """,
    went="""
    went to the {site} | walked to the {site} | drove to the {site} | came back from the {site}
    | ran to the {site} | got lost near the {site} | took a bus to the {site} | cycled past the
    {site} | stopped at the {site} | hurried to the {site} | visited the {site} | left the
    {site}
    """,
    site="""
    market | museum | library | hospital | theatre | bakery | airport | beach | castle |
    harbour | swimming pool | post office | restaurant | cinema | zoo | football stadium |
    mountain | village | lake | supermarket | bookshop | hotel | playground | lighthouse |
    university | chemist | gallery | island | valley | factory
    """,
    full="full | empty | closed | crowded | silent | noisy | busy | dark | flooded | deserted",
    felt="felt | seemed | looked | became | never felt | still looked",
    feeling="""
    happy | sad | tired | angry | proud | bored | excited | worried | sleepy | calm | cheerful
    | sick | surprised | confused | comfortable | grateful | jealous | ashamed | thirsty |
    relaxed
    """,
    happened="""
    missed the train | won the game | lost the match | slept badly | heard a strange sound |
    passed the test | found a purse | broke a leg | caught a cold | told a joke | arrived too
    late | forgot the answer | saw a ghost | moved to another city | learned to swim | stayed
    at home | changed the plan | wrote a poem | spoke to the police | needed help | lived
    abroad | worked all night | sang a song | laughed out loud | fell down the stairs | read
    the whole story | cut the grass | knew the truth
    """,
    waited="waited | looked | searched | asked | made a cake | left a note | bought flowers",
    modal="will | could | should | must | might | would like to | can",
    intended="""
    wanted to | had to | used to | decided to | hoped to | forgot to | promised to | tried to
    """,
    act="""
    leave | laugh | cry | shout | come home | call the police | run away | fall asleep | stop
    talking | arrive so late | sell the house | quit the job | go back
    """,
    task="""
    clean the {object} | sell the {object} | fix the {object} | buy a {quality} {object} |
    paint the {colour} {object} | feed the {animals} | walk the dog | make {food} | cook {food}
    | visit the {site} | meet {companion} | talk to {companion} | write to {companion} | help
    {companion} | go to the {site} | wash the {objects} | bring the {objects} | water the
    plants | learn {skill} | play {game} | watch {show} | wait {where} | sit {where} | turn off
    the lights | lock the door | set the table | take a break | get some rest | read the
    {colour} book | carry the {objects} | look {where}
    """,
    skill="""
    french | german | spanish | to dance | to swim | to drive | to cook | mathematics | history
    | to ride a horse | to play the piano | chemistry | to sew
    """,
    game="""
    football | chess | tennis | cards | basketball | golf | hockey | cricket | volleyball |
    dominoes
    """,
    show="""
    television | the news | a film | the sunset | the parade | the stars | a comedy | the race
    | the concert | the fireworks
    """,
    activity="""
    reading | swimming | dancing | playing {game} | cooking {food} | learning {skill} |
    watching {show} | walking {where} | painting | fishing | singing | riding a bicycle |
    camping | gardening | running | skating | climbing | feeding the {animals} | collecting
    {objects}
    """,
    likes="likes | loves | enjoys | hates | avoids | prefers | misses | practises",
    often="""
    every day | every morning | on weekends | in the summer | after work | before breakfast |
    at night | once a week | in winter | most evenings | all year
    """,
    weather="""
    cold | warm | sunny | cloudy | windy | foggy | very hot | rainy | stormy | freezing | quite
    mild | dry and bright | rather grey | icy | snowy
    """,
    past="""
    yesterday | last night | this morning | last week | on monday | on tuesday | on wednesday |
    on thursday | on friday | on saturday | on sunday | after lunch | before dinner | a month
    ago | two days ago | in the evening | an hour ago | last year | in the afternoon | at
    midnight | at noon | again | for the first time | {often}
    """,
    future="""
    tomorrow | tonight | next week | soon | later | on monday | on tuesday | on wednesday | on
    thursday | on friday | on saturday | on sunday | after lunch | before dinner | next month |
    in the morning | in the afternoon | this evening | at noon | next year | in an hour |
    before sunrise | right now
    """,
    assistant="""
    {please} call {person} {future} | {please} remind me to email {person} {future} | {please}
    send a message to {person} about {topic} | what is the phone number of {person} | {please}
    add {person} to my {list} | {please} tell {person} that i am {busy} | {please} book a table
    with {person} for {hour} {future} | did {person} reply to my message about {topic} |
    {please} schedule {meeting} with {person} {future} | {please} ask {person} about {topic} |
    when is my next {appointment} with {person} | {please} forward {paper} to {person} |
    {please} invite {person} to {event} {future} | {please} read the last message from {person}
    | is {person} free {future} | when is the birthday of {person} | {please} start a video
    call with {person} {future} | how far is it to {place} {from_here} | what is the weather in
    {place} {future} | {please} navigate to {place} {avoiding} | {please} book a hotel in
    {place} for {number} nights | {please} find a {shop} in {place} | when does the {next}
    train to {place} leave {future} | how long is the drive to {place} {future} | {please} find
    flights to {place} {future} | is there much traffic on the way to {place} {future} |
    {please} play the local radio from {place} {future} | what time is it in {place}
    {from_here} | {please} show me pictures of {place} | {please} buy {number} tickets to
    {place} {future} | {please} pay the {next} invoice from {company} | when does {company}
    open {future} | {please} order more {supply} from {company} | {please} cancel my
    {appointment} at {company} {future} | what is the address of {company} | {please} find
    reviews of {company} | {please} send {paper} to {company} {future} | how do i get to
    {company} {from_here} | {please} call the {desk} of {company} {future} | how much did we
    spend on {supply} from {company} | {please} track my order of {supply} from {company} |
    {please} show me the opening hours of {company} {future} | {please} call {person} at
    {company} {future} | {please} remind me to email {person} about the trip to {place} |
    {please} book {meeting} with {person} at {company} {future} | {please} drive me to
    {company} in {place} | {please} send {paper} to {person} at {company} | is there a branch
    of {company} near {place} | {please} tell {person} that i am in {place} {future} | is
    {company} in {place} open {future} | {please} share my location in {place} with {person} |
    who is {person} from {company} | {please} order a taxi from {place} to {company} {future} |
    {please} meet {person} in {place} {future} | did {person} from {company} call about {topic}
    """,
    please="| | | please | can you | could you | could you please | hey | i want you to",
    topic="""
    the {topic_word} | the new {topic_word} | the {topic_word} {future} | the cost of the
    {topic_word}
    """,
    topic_word="""
    budget | contract | holiday | party | meeting | invoice | delivery | project | schedule |
    wedding | report | interview | repair | insurance | concert | homework
    """,
    list="contacts | favourites | guest list | team | calendar | family group",
    busy="""
    running late | on my way | stuck in traffic | still at work | in a meeting | feeling better
    | not coming | almost there | waiting outside
    """,
    hour="""
    one | two | three | four | five | six | seven | eight | nine | half past six | half past
    seven | quarter to eight | quarter past five
    """,
    meeting="""
    a meeting | a call | lunch | an interview | a short visit | a review | coffee | a lesson
    """,
    appointment="appointment | meeting | lesson | delivery | reservation | visit | check up",
    paper="""
    the {topic_word} document | the {topic_word} photos | the last email | the {topic_word}
    notes | the signed form | a copy of the {topic_word} | the {topic_word} plan
    """,
    event="""
    the party | the dinner | the concert | the {topic_word} meeting | the barbecue | the picnic
    | the wedding | the video call | the game
    """,
    from_here="""
    | from here | by car | by train | on foot | from my hotel | from the airport | right now
    """,
    avoiding="| without motorways | on the fastest road | and avoid the traffic | after {hour}",
    shop="""
    bakery | chemist | car park | good restaurant | petrol station | cheap hotel | supermarket
    | quiet cafe | bookshop | bank | dentist | post office
    """,
    next="| next | first | last",
    supply="""
    paper | printer ink | flour | screws | light bulbs | coffee beans | envelopes | batteries |
    tiles | firewood | cables | bandages | towels | paint | bricks | soap
    """,
    desk="office | front desk | sales team | manager | help desk | head office | night service",
    person_name="{first} {family}",
    place_name="{town} | {town} | {town} | {side} {town}",
    side="north | south | east | west | upper | lower | old | new | little | great | port | lake",
    company_name="""
    {family} and {partner} | {family} and sons | {family} brothers | {family} {trade} |
    {family} {trade} | {family} {trade} | {family} and {partner} {trade}
    """,
    trade="""
    logistics | motors | dental | bakery | plumbing | travel | insurance | electronics |
    furniture | consulting | systems | flowers | books | pharmacy | builders | tools | sports |
    solutions | foods | energy | holdings | interiors | roofing | security
    """,
    stem="""
    alder | ash | beck | black | brad | bram | bran | bray | brin | brock | bux | cald | carl |
    chad | cran | crow | dal | darn | ding | elm | fal | farn | fern | glen | gold | grim | hal
    | harl | hart | hasl | hawk | hex | kel | kirk | lang | lind | mal | marl | mel | mil | nor
    | oak | pem | pen | rad | rav | red | rock | rus | sel | shel | stan | stock | stroud | sud
    | swin | tam | thorn | tiver | tren | wake | wal | war | wel | wind | wood | york
    """,
    ending="""
    ford | ton | bury | ham | wick | mouth | field | dale | worth | combe | by | stead | leigh
    | bridge | well | minster | thorpe | stoke | more | gate | haven | burn | cote | market
    """,
)
