//! Which replica answers: policies side by side on the same chats.
//!
//! Chats of several tenants, turn after turn, on nodes that run the daemon's own batcher with a cost
//! model in place of kernels. Every node is an ingress with a router of its own, which hears of the
//! others' load by reports that are late, and of their caches by a directory that is late. Who decodes
//! fetches cached blocks where its router says that it pays, under every policy; nobody computes prompts
//! for others.

mod directory;
mod moves;
mod policy;
mod replica;
mod trace;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use cache::{HashChain, TenantSalt};
use protocol::random::Random;
use protocol::{Instant, NodeId, RequestId, SequenceId, TenantId, TokenId};
use scheduler::router::{DecisionStats, Outcome, Policy, ReplicaLoad};

use directory::Directory;
use moves::{Between, Job, Move};
use policy::{Ingress, Wanted};
use replica::{Happened, Replica, identity};
use trace::{Chat, chats};

pub use trace::Load;

/// One run: a load, a seed, a policy.
#[derive(Clone, Copy, Debug)]
pub struct Study {
    pub load: Load,
    pub seed: u64,
    pub policy: Policy,
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Result {
    /// Time to the first token of each turn, milliseconds, sorted.
    pub ttft_ms: Vec<f64>,
    /// Mean gap between the tokens of each answer, milliseconds, sorted.
    pub gap_ms: Vec<f64>,
    pub prompt_tokens: u64,
    /// Of them, those that were not computed for it; fetched ones are among them.
    pub cached_tokens: u64,
    pub moved_tokens: u64,
    /// Fetches, those included that brought nothing.
    pub moves: u64,
    /// Seconds that each node computed.
    pub busy_s: Vec<f64>,
    pub refused: u64,
    /// Sums over the routers, of the policy that has estimates.
    pub decisions: DecisionStats,
}

impl Result {
    /// Puts another run's numbers to these.
    pub fn add(&mut self, other: Result) {
        self.ttft_ms.extend(other.ttft_ms);
        self.gap_ms.extend(other.gap_ms);
        self.ttft_ms.sort_by(f64::total_cmp);
        self.gap_ms.sort_by(f64::total_cmp);
        self.prompt_tokens += other.prompt_tokens;
        self.cached_tokens += other.cached_tokens;
        self.moved_tokens += other.moved_tokens;
        self.moves += other.moves;
        self.busy_s.resize(self.busy_s.len().max(other.busy_s.len()), 0.0);
        self.busy_s.iter_mut().zip(other.busy_s).for_each(|(sum, one)| *sum += one);
        self.refused += other.refused;
        add(&mut self.decisions, &other.decisions);
    }

    pub fn hit_rate(&self) -> f64 {
        self.cached_tokens as f64 / self.prompt_tokens.max(1) as f64
    }

    /// Share of all prompt tokens that came from another node's cache.
    pub fn fetched(&self) -> f64 {
        self.moved_tokens as f64 / self.prompt_tokens.max(1) as f64
    }

    /// Computing time of the busiest node over the mean of all.
    pub fn spread(&self) -> f64 {
        let mean = self.busy_s.iter().sum::<f64>() / self.busy_s.len().max(1) as f64;
        self.busy_s.iter().fold(0.0, |a, b| f64::max(a, *b)) / mean.max(1e-9)
    }
}

fn add(sum: &mut DecisionStats, one: &DecisionStats) {
    sum.first_tokens += one.first_tokens;
    sum.error_us += one.error_us;
    sum.regret_us += one.regret_us;
    sum.regret_explored_us += one.regret_explored_us;
    sum.replicas.iter_mut().zip(one.replicas).for_each(|(sum, one)| *sum += one);
}

/// The value below which so much of a sorted list lies.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(place.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// A moment of the run and what happens then; equal moments in the order in which they were planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The next turn of a chat is asked.
    Ask { chat: usize },
    /// The step that a node computes ends.
    StepEnds { node: usize },
    /// A replica is to do this before its next step.
    Job { node: usize, request: u64, job: Job },
    /// Every node reports its load, and hears what the others reported a while ago.
    Reports,
}

/// A turn under way.
struct Turn {
    chat: usize,
    ingress: usize,
    node: usize,
    asked_us: u64,
    first_us: Option<u64>,
    prompt: Vec<TokenId>,
    answer: Vec<TokenId>,
    hop_us: u64,
}

struct World {
    now_us: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    planned: u64,
    replicas: Vec<Replica>,
    ingresses: Vec<Ingress>,
    directory: Directory,
    /// Loads as they were at each report, the newest last.
    reports: Vec<Vec<ReplicaLoad>>,
    chats: Vec<Chat>,
    turns: BTreeMap<u64, Turn>,
    /// Turns that are not with a replica yet.
    moves: BTreeMap<u64, Move>,
    between: Vec<Between>,
    next_request: u64,
    random: Random,
    result: Result,
}

impl Study {
    /// Runs it to the last answer. The same study always gives the same result.
    pub fn run(self) -> Result {
        let speeds = self.load.speeds();
        let replicas: Vec<Replica> = speeds.iter().map(|&speed| Replica::new(speed)).collect();
        let ids: Vec<NodeId> = (0..speeds.len()).map(node_id).collect();
        let mut world = World {
            now_us: 0,
            events: BinaryHeap::new(),
            planned: 0,
            ingresses: ids.iter().map(|&own| Ingress::new(self.policy, own)).collect(),
            directory: Directory::new(replicas.len(), replica::BLOCKS as usize),
            reports: Vec::new(),
            chats: chats(self.load, self.seed),
            turns: BTreeMap::new(),
            moves: BTreeMap::new(),
            between: replicas.iter().map(|_| Between::default()).collect(),
            next_request: 1,
            random: Random::new(self.seed ^ INGRESS_SEED),
            result: Result { busy_s: vec![0.0; replicas.len()], ..Result::default() },
            replicas,
        };
        world.run();
        world.result
    }
}

impl World {
    fn run(&mut self) {
        for chat in 0..self.chats.len() {
            let first_us = self.chats[chat].begins_us;
            self.plan(first_us, Event::Ask { chat });
        }
        self.plan(0, Event::Reports);
        while let Some(Reverse((at, _, event))) = self.events.pop() {
            self.now_us = at;
            match event {
                Event::Ask { chat } => self.ask(chat),
                Event::StepEnds { node } => {
                    let happened = self.replicas[node].end_step(at);
                    self.happened(node, happened);
                    self.between_steps(node);
                }
                Event::Job { node, request, job } => self.give(node, request, job),
                Event::Reports => self.report(),
            }
        }
        assert!(self.turns.is_empty() && self.moves.is_empty(), "every turn has ended");
        for (sum, replica) in self.result.busy_s.iter_mut().zip(&self.replicas) {
            *sum = replica.busy_us as f64 / 1e6;
        }
        for ingress in &self.ingresses {
            add(&mut self.result.decisions, &ingress.decision_stats());
        }
    }

    fn plan(&mut self, at_us: u64, event: Event) {
        self.planned += 1;
        self.events.push(Reverse((at_us, self.planned, event)));
    }

    fn now(&self) -> Instant {
        Instant::from_nanos(self.now_us * 1000)
    }

    fn ask(&mut self, chat: usize) {
        let request = self.next_request;
        self.next_request += 1;
        let ingress = self.random.below(self.ingresses.len());
        let Chat { tenant, prompt, turns, .. } = &self.chats[chat];
        let (prompt, output) = (prompt.clone(), turns[0].answer_tokens);
        let tenant_id = tenant_of(*tenant);
        let salt = TenantSalt::derive(&[7; 32], &tenant_id);
        let mut chain = HashChain::new(salt, &identity(), cache::BLOCK_TOKENS_DEFAULT);
        chain.extend(&prompt);
        let now = self.now();
        let wanted = Wanted {
            // A number that looks like those of the daemon: ties and explorations are drawn from it.
            request: RequestId(
                u128::from(protocol::random::mix(request)) << 64 | u128::from(request),
            ),
            prompt_tokens: prompt.len() as u64,
            overlap_tokens: self.directory.overlaps(self.now_us, chain.hashes()),
        };
        let own = self.replicas[ingress].load();
        let node = self.ingresses[ingress].choose(now, ingress, own, &wanted);
        let hop_us = if node == ingress { 0 } else { HOP_US };
        let sequence = SequenceId(request);
        let submission = replica::submission(sequence, tenant_id, salt, prompt.clone(), output);
        let turn = Turn {
            chat,
            ingress,
            node,
            asked_us: self.now_us,
            first_us: None,
            prompt,
            answer: Vec::new(),
            hop_us,
        };
        self.result.prompt_tokens += turn.prompt.len() as u64;
        self.turns.insert(request, turn);
        self.begin(request, node, submission);
    }

    /// Begins the next step of a node that computes none.
    fn go_on(&mut self, node: usize) {
        let (ends, happened) = self.replicas[node].begin_step(self.now_us);
        if let Some(ends) = ends {
            self.plan(ends, Event::StepEnds { node });
        }
        self.happened(node, happened);
    }

    fn happened(&mut self, node: usize, happened: Vec<Happened>) {
        for what in happened {
            match what {
                Happened::Started { cached_tokens } => {
                    self.result.cached_tokens += cached_tokens as u64;
                }
                Happened::Token { request, token } => self.token(request, token),
                Happened::Ended { request, refused } => self.ended(node, request, refused),
            }
        }
    }

    fn token(&mut self, request: u64, token: TokenId) {
        let (now_us, now) = (self.now_us, self.now());
        let Some(turn) = self.turns.get_mut(&request) else { return };
        turn.answer.push(token);
        if turn.first_us.is_some() {
            return;
        }
        turn.first_us = Some(now_us);
        let waited_us = now_us - turn.asked_us + turn.hop_us;
        self.result.ttft_ms.push(waited_us as f64 / 1e3);
        self.ingresses[turn.ingress].first_token(now, request);
        let (tenant, node) = (self.chats[turn.chat].tenant, turn.node);
        self.directory.stored(now_us, node, &names(tenant, &turn.prompt));
    }

    /// A turn is over: its chat goes on after a while.
    fn ended(&mut self, node: usize, request: u64, refused: bool) {
        let now = self.now();
        let Some(turn) = self.turns.remove(&request) else { return };
        self.ingresses[turn.ingress].ended(now, turn.node, request);
        if refused {
            // Its client gives up: the chat is over.
            self.result.refused += 1;
            return;
        }
        let Turn { chat, first_us, mut prompt, answer, .. } = turn;
        let decoding_us = self.now_us - first_us.unwrap_or(self.now_us);
        if answer.len() > 1 {
            let gaps = (answer.len() - 1) as f64;
            self.result.gap_ms.push(decoding_us as f64 / 1e3 / gaps);
        }
        prompt.extend(answer);
        let tenant = self.chats[chat].tenant;
        self.directory.stored(self.now_us, node, &names(tenant, &prompt));
        if let Some(think_us) = self.chats[chat].turn_over(prompt) {
            self.plan(self.now_us + think_us, Event::Ask { chat });
        }
    }

    fn report(&mut self) {
        self.reports.push(self.replicas.iter().map(Replica::load).collect());
        let old = self.reports.len().saturating_sub(1 + REPORTS_LATE);
        let (now, loads) = (self.now(), self.reports[old].clone());
        for (own, ingress) in self.ingresses.iter_mut().enumerate() {
            ingress.report(now, own, &loads);
        }
        let is_over = self.turns.is_empty() && self.events.is_empty();
        if !is_over {
            self.plan(self.now_us + REPORT_EVERY_US, Event::Reports);
        }
    }
}

fn names(tenant: usize, tokens: &[TokenId]) -> Vec<cache::BlockHash> {
    let salt = TenantSalt::derive(&[7; 32], &tenant_of(tenant));
    let mut chain = HashChain::new(salt, &identity(), cache::BLOCK_TOKENS_DEFAULT);
    chain.extend(tokens);
    chain.hashes().to_vec()
}

fn tenant_of(tenant: usize) -> TenantId {
    TenantId::new(&format!("tenant-{tenant}")).expect("a valid name")
}

fn node_id(node: usize) -> NodeId {
    NodeId([node as u8 + 1; 32])
}

/// The outcome of an attempt that the simulator gives to routers when its answer begins.
const BEGAN: Outcome = Outcome::Began;
/// From one node to another and back.
const HOP_US: u64 = 1_000;
/// As in the daemon: twice a second.
const REPORT_EVERY_US: u64 = 500_000;
/// Reports are that many intervals old when they are heard.
const REPORTS_LATE: usize = 1;
/// Clients ask any node, the same in every policy.
const INGRESS_SEED: u64 = 0x1297_7c5d_0000_0001;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_study_gives_the_same_result() {
        for policy in Policy::ALL {
            let study = Study { load: Load::Short, seed: 3, policy };
            let (a, b) = (study.run(), study.run());
            assert_eq!((&a.ttft_ms, a.cached_tokens), (&b.ttft_ms, b.cached_tokens), "{policy:?}");
            assert!(a.ttft_ms.len() > 50, "{policy:?}: {} turns", a.ttft_ms.len());
        }
    }

    /// Not how good it is, which docs/routing.md shows, but that what must follow from caches does.
    #[test]
    fn caches_are_used() {
        let of = |policy| {
            let mut sum = Result::default();
            (0..3).for_each(|seed| sum.add(Study { load: Load::Short, seed, policy }.run()));
            sum
        };
        let (spread, cost) = (of(Policy::RoundRobin), of(Policy::Cost));
        assert!(cost.hit_rate() > spread.hit_rate(), "{} {}", cost.hit_rate(), spread.hit_rate());
        let median = |result: &Result| quantile(&result.ttft_ms, 0.5);
        assert!(median(&cost) < median(&spread), "{} {}", median(&cost), median(&spread));
        // who is asked in turn has little of a chat cached, and gets it from who has
        assert!(spread.moves > 0 && spread.fetched() > cost.fetched());
    }
}
