//! What an operator may set.

use protocol::Duration;

use super::Disagg;

/// By what a replica is chosen of those that nothing speaks against. All but the first are there to be
/// compared with it, in the simulator and by `tests/cluster/trace.py`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Policy {
    /// What it costs, with all that is known.
    #[default]
    Cost,
    /// Fewest sequences, those sent since the last report included.
    LeastLoaded,
    /// One after the other.
    RoundRobin,
    /// Most of the prompt in its cache, whatever it has to do.
    PrefixOnly,
}

impl Policy {
    pub const ALL: [Policy; 4] =
        [Policy::RoundRobin, Policy::LeastLoaded, Policy::PrefixOnly, Policy::Cost];

    pub const fn as_str(self) -> &'static str {
        match self {
            Policy::Cost => "cost",
            Policy::LeastLoaded => "least-loaded",
            Policy::RoundRobin => "round-robin",
            Policy::PrefixOnly => "prefix-only",
        }
    }
}

/// What an operator may set, and what a wrong value does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterConfig {
    pub policy: Policy,
    /// Unit: time that a report is older than its arrival. What was sent within it before the arrival
    /// counts beside the report. Formula: `gossip delay + replica's own delay`. Too small: requests
    /// are forgotten before they are reported, and others follow them. Too large: they count twice for
    /// a while. Default 500 ms.
    pub report_lag: Duration,
    /// Unit: percent of a millisecond of waiting that a millisecond of later gaps counts for, the
    /// answer's own and those that it adds to its neighbours'. Too small: prompts are computed where
    /// they stop many streams. Too large: an idle slow replica is preferred to a cached prefix beside a
    /// stream. Default 10.
    pub decode_weight_percent: u32,
    /// Unit: time of a decoding step of a replica that has measured none. Too small: unknown ones are
    /// preferred. Too large: they are never measured. Default 20 ms.
    pub step_guess: Duration,
    /// Unit: percent of its step's time that one more stream adds for all of them. Formula: (step of n
    /// streams / step of one - 1) / (n - 1), by `vine bench -b`; 6 to 10 with 8 streams of quantized
    /// models of half a billion weights. Too small: a replica full of streams looks free. Too large: an
    /// idle slow replica is preferred to a fast one with a stream. Default 10.
    pub stream_share_percent: u32,
    /// Unit: time that another node costs against this one beside the way to it: its share of failures.
    /// Too small: requests travel for nothing. Too large: this node works while others idle. Default
    /// 5 ms.
    pub hop_cost: Duration,
    /// Unit: time that prompts wait at a replica before it counts as overloaded, which ranks it behind
    /// all others whatever it has cached. Too small: cached prefixes are computed anew elsewhere. Too
    /// large: a popular prefix drowns its node. Default 10 s.
    pub queue_max: Duration,
    /// Unit: time that another way to a prompt's keys and values must save against computing it, and
    /// percent of that. Too small: blocks travel for what noise measures. Too large: peers idle while
    /// prompts wait. Default 20 ms.
    pub gain_min: Duration,
    /// Default 10.
    pub gain_min_percent: u32,
    /// Whether peers compute prompts for those that decode; what this node assumes of all others.
    pub disagg: Disagg,
    /// Unit: requests of a thousand that go to another replica than the cheapest, to learn how it does:
    /// one that looks slow and is not would never be asked again. Too small: it is learnt late. Too
    /// large: clients pay for it. Default 15.
    pub explore_permille: u32,
    /// Unit: cost beyond the cheapest's that learning may have. Default 50 ms.
    pub explore_cost_max: Duration,
    /// Unit: failures in a row after which a node is left alone. Too small: one broken request takes
    /// a good node away. Too large: each client meets the bad node first. Default 3.
    pub failures_to_open: u32,
    /// Unit: time that a node is left alone, doubled at each failed trial after it, up to `open_max`.
    /// Too small: clients try it in vain. Too large: a healed node idles. Default 1 s.
    pub open_min: Duration,
    /// Default 30 s.
    pub open_max: Duration,
}

impl Default for RouterConfig {
    fn default() -> Self {
        RouterConfig {
            policy: Policy::Cost,
            report_lag: Duration::from_millis(500),
            decode_weight_percent: 10,
            step_guess: Duration::from_millis(20),
            stream_share_percent: 10,
            hop_cost: Duration::from_millis(5),
            queue_max: Duration::from_secs(10),
            gain_min: Duration::from_millis(20),
            gain_min_percent: 10,
            disagg: Disagg::Auto,
            explore_permille: 15,
            explore_cost_max: Duration::from_millis(50),
            failures_to_open: 3,
            open_min: Duration::from_secs(1),
            open_max: Duration::from_secs(30),
        }
    }
}
