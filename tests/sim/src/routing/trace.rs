//! Chats: a tenant's instructions, then turn after turn upon all that was said before.

use protocol::TokenId;
use protocol::random::{Random, mix};

/// Which chats come, and to which nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Four equal nodes, eight tenants.
    Even,
    /// The same with a third of the chats.
    Light,
    /// The same with half as many again.
    Heavy,
    /// Seven of ten chats are one tenant's, whose instructions are long.
    Hot,
    /// Nodes of speeds 2, 1, 1 and 1/2.
    Unequal,
    /// Chats of one turn that share nothing.
    Apart,
    /// A minute, for tests.
    Short,
}

impl Load {
    /// Those of the study.
    pub const ALL: [Load; 6] =
        [Load::Even, Load::Light, Load::Heavy, Load::Hot, Load::Unequal, Load::Apart];

    pub const fn as_str(self) -> &'static str {
        match self {
            Load::Even => "even",
            Load::Light => "light",
            Load::Heavy => "heavy",
            Load::Hot => "hot tenant",
            Load::Unequal => "unequal nodes",
            Load::Apart => "nothing shared",
            Load::Short => "short",
        }
    }

    pub fn speeds(self) -> [f64; 4] {
        match self {
            Load::Unequal => [2.0, 1.0, 1.0, 0.5],
            _ => [1.0; 4],
        }
    }

    /// Chats that begin each second, and for how long.
    fn arrivals(self) -> (f64, f64) {
        match self {
            Load::Even | Load::Hot | Load::Unequal => (0.6, 600.0),
            Load::Light => (0.2, 600.0),
            Load::Heavy => (0.9, 600.0),
            Load::Apart => (2.0, 300.0),
            Load::Short => (1.0, 60.0),
        }
    }
}

pub struct Chat {
    pub tenant: usize,
    pub begins_us: u64,
    /// What the next turn asks: everything so far.
    pub prompt: Vec<TokenId>,
    /// The turns to come, the next first.
    pub turns: Vec<TurnPlan>,
    random: Random,
}

pub struct TurnPlan {
    pub answer_tokens: usize,
    /// Until the turn after it is asked, and how long what is asked is.
    think_us: u64,
    next_tokens: usize,
}

impl Chat {
    /// The next turn has been answered; `said` is all that was said. Gives the time until the turn
    /// after it.
    pub fn turn_over(&mut self, said: Vec<TokenId>) -> Option<u64> {
        let over = self.turns.remove(0);
        if self.turns.is_empty() {
            return None;
        }
        self.prompt = said;
        let asked = (0..over.next_tokens).map(|_| self.random.below(30_000) as TokenId);
        self.prompt.extend(asked.collect::<Vec<_>>());
        Some(over.think_us)
    }
}

/// The chats of a load, from one seed, in the order of their beginnings.
pub fn chats(load: Load, seed: u64) -> Vec<Chat> {
    let mut random = Random::new(seed ^ 0x6368_6174);
    let (rate, seconds) = load.arrivals();
    let mut at = 0.0;
    let mut all = Vec::new();
    loop {
        at += exponential(&mut random, 1.0 / rate);
        if at > seconds {
            return all;
        }
        all.push(chat(load, &mut random, (at * 1e6) as u64));
    }
}

fn chat(load: Load, random: &mut Random, begins_us: u64) -> Chat {
    let hot = load == Load::Hot && random.unit() < 0.7;
    // A few tenants have most of the chats.
    let tenant = if hot { 0 } else { ((random.unit() * random.unit()) * TENANTS as f64) as usize };
    let instructions = match load {
        Load::Apart => 0,
        Load::Hot if tenant == 0 => 2_000,
        _ => 200 + 150 * tenant,
    };
    let own = |place: usize| (mix((tenant as u64) << 32 | place as u64) % 30_000) as TokenId;
    let mut prompt: Vec<TokenId> = (0..instructions).map(own).collect();
    let first = if load == Load::Apart { 600 } else { 100 };
    let asked = 16 + exponential(random, f64::from(first)) as usize % 4000;
    let mut words = Random::new(random.next_u64());
    prompt.extend((0..asked).map(|_| words.below(30_000) as TokenId));
    let turns = if load == Load::Apart { 1 } else { 1 + random.below(8) };
    let turns = (0..turns).map(|_| TurnPlan {
        answer_tokens: 20 + exponential(random, 120.0) as usize % 600,
        think_us: (1e6 + exponential(random, 12e6)) as u64,
        next_tokens: 8 + exponential(random, 60.0) as usize % 1000,
    });
    let turns = turns.collect();
    Chat { tenant, begins_us, prompt, turns, random: words }
}

fn exponential(random: &mut Random, mean: f64) -> f64 {
    -mean * (1.0 - random.unit()).ln()
}

const TENANTS: usize = 8;
