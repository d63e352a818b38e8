//! The side that tells.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use protocol::directory::{
    Events, Heard, NAMES_MAX, News, Part, Piece, Report, SHARDS_MAX, ShortName, Sum, owners,
};
use protocol::random::Random;
use protocol::{Duration, Instant, Machine, NodeId};

/// Bounds and waits of a reporter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReporterConfig {
    /// Unit: owners of a part. Too small: with the loss of one, nothing is known for a while. Too large:
    /// each event is sent as often, and held as often. Equal for the whole cell. Default 2.
    pub owners: usize,
    /// Unit: shards of a model, 1 to [`SHARDS_MAX`]. Formula: `nodes x events of a node per second /
    /// 1,000,000`, or `different blocks of a model / 2,000,000`, whichever is more. Too small: owners have
    /// no room or no time. Too large: more messages. Equal for the whole cell. Default 1.
    pub shards: u16,
    /// Unit: time that an event waits for others. Too small: a message for each step. Too large: peers
    /// learn late of what is here. Default 100 ms.
    pub batch_wait: Duration,
    /// Unit: events that wait for no others. Default 512.
    pub batch_events: usize,
    /// Unit: names of one piece, at most [`NAMES_MAX`]. Too small: a round trip for few names. Too large:
    /// the owner does nothing else meanwhile. Default 1024.
    pub piece_names: usize,
    /// Unit: events kept for an owner that has not confirmed them; 16 bytes each. Too small: after a pause
    /// all is said again. Too large: memory. Default 16,384.
    pub events_max: usize,
    /// Unit: names of one model; others are not reported. About 16 bytes each. Default 1,048,576.
    pub names_max: usize,
    /// Unit: time for an owner's answer. Default 2 s.
    pub answer_wait: Duration,
    /// Unit: time after which an owner that failed is told again, doubled with each failure in a row.
    /// Default 250 ms.
    pub retry_min: Duration,
    /// Default 8 s.
    pub retry_max: Duration,
    /// Unit: time without news after which the reporter says that it has none, so that an owner that has
    /// forgotten it, or holds something else, learns so. Too small: messages for nothing. Too large: after
    /// the restart of an owner little is known. Default 10 s.
    pub refresh: Duration,
}

impl Default for ReporterConfig {
    fn default() -> Self {
        ReporterConfig {
            owners: 2,
            shards: 1,
            batch_wait: Duration::from_millis(100),
            batch_events: 512,
            piece_names: 1024,
            events_max: 16_384,
            names_max: 1 << 20,
            answer_wait: Duration::from_secs(2),
            retry_min: Duration::from_millis(250),
            retry_max: Duration::from_secs(8),
            refresh: Duration::from_secs(10),
        }
    }
}

/// One report that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub u64);

/// What a reporter is told. Identities are [`NumericalIdentity`](crate::NumericalIdentity) as bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReporterInput {
    /// Who is a member now: alive or suspected, this node included.
    Members(Vec<NodeId>),
    /// This node has a replica of that model, without any blocks yet.
    Serve { identity: [u8; 32] },
    /// The replica is gone, and its blocks with it.
    Unserve { identity: [u8; 32] },
    /// These blocks can be fetched here from now on. `first` is the first block of their sequence.
    Stored { identity: [u8; 32], first: ShortName, names: Vec<ShortName> },
    /// These cannot any more.
    Removed { identity: [u8; 32], names: Vec<ShortName> },
    /// The answer to a `Tell`.
    Answered { call: CallId, heard: Heard },
    /// There is none: the owner was not reached, was silent, or does not know the method.
    Failed { call: CallId },
    /// [`next_deadline`](Machine::next_deadline) is over.
    Timer,
}

/// What the shell does for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReporterOutput {
    /// Give the report to that owner, which may be this node itself, and say how it went: once, or never
    /// after `answer_wait`.
    Tell { owner: NodeId, call: CallId, report: Report },
}

/// A reporter at one moment, and what has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReporterStats {
    /// Stored here, and reported or about to be.
    pub names: usize,
    /// Links to owners, and those whose owner has all but the last events.
    pub links: usize,
    pub links_well: usize,
    /// Reports, events and names of pieces sent.
    pub reports: u64,
    pub events: u64,
    pub dumped: u64,
    /// Names not reported because there were too many.
    pub beyond: u64,
}

/// What this node says of its blocks, model by model and owner by owner.
///
/// Each link to an owner has at most one report under way. The answer says where the owner stands, and
/// that alone decides what comes next, so that lost, late and doubled messages need no care of their own.
#[derive(Debug)]
pub struct Reporter {
    config: ReporterConfig,
    random: Random,
    members: Vec<NodeId>,
    models: BTreeMap<[u8; 32], Vec<Log>>,
    calls: u64,
    stats: ReporterStats,
}

/// One part of one model.
#[derive(Debug)]
struct Log {
    part: Part,
    epoch: u64,
    /// What is stored now.
    names: BTreeSet<ShortName>,
    sum: Sum,
    /// The last events, and the number of the first of them.
    events: VecDeque<(ShortName, bool)>,
    first: u64,
    links: Vec<Link>,
}

/// An owner of a part, as this node knows it.
#[derive(Debug)]
struct Link {
    owner: NodeId,
    /// Where it said it stands. `None`: it needs everything.
    known: Option<Known>,
    call: Option<Call>,
    /// When it is told something; the call's end while there is one.
    speak_at: Instant,
    /// Until `speak_at` it is not told anything, whatever happens.
    waits: bool,
    /// Answers in a row that were none, or not the expected ones.
    strikes: u32,
    refresh_at: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    next: u64,
    missing: Option<ShortName>,
}

#[derive(Debug)]
struct Call {
    id: CallId,
    /// Where the owner stands if all goes well.
    expected: Known,
}

impl Reporter {
    pub fn new(config: ReporterConfig, seed: u64) -> Self {
        Reporter {
            config,
            random: Random::new(seed),
            members: Vec::new(),
            models: BTreeMap::new(),
            calls: 0,
            stats: ReporterStats::default(),
        }
    }

    /// The owners of the part where sequences of a model belong that begin with `first`, as this node sees
    /// it: whom to query, the first one first.
    pub fn owners_of(&self, identity: [u8; 32], first: ShortName) -> (Part, Vec<NodeId>) {
        let part = Part::of(identity, self.config.shards, first);
        (part, owners(&part, &self.members, self.config.owners))
    }

    pub fn stats(&self) -> ReporterStats {
        let logs = || self.models.values().flatten();
        let links = || logs().flat_map(|log| &log.links);
        let is_well =
            |link: &&Link| link.strikes == 0 && link.known.is_some_and(|k| k.missing.is_none());
        ReporterStats {
            names: logs().map(|log| log.names.len()).sum(),
            links: links().count(),
            links_well: links().filter(is_well).count(),
            ..self.stats
        }
    }

    fn on_members(&mut self, now: Instant, mut members: Vec<NodeId>) {
        members.sort_unstable();
        members.dedup();
        self.members = members;
        for log in self.models.values_mut().flatten() {
            log.choose_owners(now, &self.members, &self.config);
        }
    }

    fn serve(&mut self, now: Instant, identity: [u8; 32]) {
        if self.models.contains_key(&identity) {
            return;
        }
        let shards = self.config.shards.clamp(1, SHARDS_MAX);
        let epoch = self.random.next_u64();
        let log = |shard| {
            let mut log = Log::new(Part { identity, shard, shards }, epoch);
            log.choose_owners(now, &self.members, &self.config);
            log
        };
        self.models.insert(identity, (0..shards).map(log).collect());
    }

    fn unserve(&mut self, identity: [u8; 32], out: &mut Vec<ReporterOutput>) {
        for log in self.models.remove(&identity).into_iter().flatten() {
            for link in log.links {
                // Once: an owner that does not hear it forgets a silent node.
                let call = next_call(&mut self.calls);
                let report = Report { part: log.part, epoch: log.epoch, news: News::Gone };
                out.push(ReporterOutput::Tell { owner: link.owner, call, report });
            }
        }
    }

    fn stored(&mut self, now: Instant, identity: [u8; 32], first: ShortName, names: &[ShortName]) {
        let Some(logs) = self.models.get_mut(&identity) else { return };
        let held: usize = logs.iter().map(|log| log.names.len()).sum();
        let room = self.config.names_max.saturating_sub(held);
        let shard = Part::of(identity, self.config.shards, first).shard;
        let log = &mut logs[usize::from(shard)];
        let mut stored = 0;
        for name in names {
            if stored == room {
                self.stats.beyond += u64::from(!log.names.contains(name));
            } else if log.names.insert(*name) {
                stored += 1;
                log.sum.add(*name);
                log.push(now, (*name, false), &self.config);
            }
        }
    }

    fn removed(&mut self, now: Instant, identity: [u8; 32], names: &[ShortName]) {
        let Some(logs) = self.models.get_mut(&identity) else { return };
        for name in names {
            // The shard is that of the first block, which the name does not tell.
            if let Some(log) = logs.iter_mut().find(|log| log.names.contains(name)) {
                log.names.remove(name);
                log.sum.subtract(*name);
                log.push(now, (*name, true), &self.config);
            }
        }
    }

    fn on_answer(&mut self, now: Instant, call: CallId, heard: Option<Heard>) {
        let is_of = |link: &&mut Link| link.call.as_ref().is_some_and(|c| c.id == call);
        for log in self.models.values_mut().flatten() {
            if let Some(link) = log.links.iter_mut().find(is_of) {
                let position = log.first + log.events.len() as u64;
                link.on_answer(now, heard, position, &self.config, &mut self.random);
                log.forget_confirmed();
                return;
            }
        }
    }

    /// Tells each owner whose time has come, and gives up answers that are late.
    fn speak(&mut self, now: Instant, out: &mut Vec<ReporterOutput>) {
        let Reporter { config, random, calls, stats, .. } = self;
        for log in self.models.values_mut().flatten() {
            for at in 0..log.links.len() {
                if log.links[at].speak_at > now {
                    continue;
                }
                if log.links[at].call.is_some() {
                    log.links[at].on_answer(now, None, 0, config, random);
                    continue;
                }
                let (report, expected) = log.report(now, at, config);
                stats.count(&report);
                let call = next_call(calls);
                let link = &mut log.links[at];
                link.call = Some(Call { id: call, expected });
                link.speak_at = now + config.answer_wait;
                if matches!(report.news, News::Blocks { sum: Some(_), .. }) {
                    link.refresh_at = now + spread(config.refresh, random);
                }
                out.push(ReporterOutput::Tell { owner: link.owner, call, report });
            }
        }
    }
}

impl Machine for Reporter {
    type Input = ReporterInput;
    type Output = ReporterOutput;

    fn handle(&mut self, now: Instant, input: ReporterInput, out: &mut Vec<ReporterOutput>) {
        match input {
            ReporterInput::Members(members) => self.on_members(now, members),
            ReporterInput::Serve { identity } => self.serve(now, identity),
            ReporterInput::Unserve { identity } => self.unserve(identity, out),
            ReporterInput::Stored { identity, first, names } => {
                self.stored(now, identity, first, &names);
            }
            ReporterInput::Removed { identity, names } => self.removed(now, identity, &names),
            ReporterInput::Answered { call, heard } => self.on_answer(now, call, Some(heard)),
            ReporterInput::Failed { call } => self.on_answer(now, call, None),
            ReporterInput::Timer => {}
        }
        self.speak(now, out);
    }

    fn next_deadline(&self) -> Option<Instant> {
        let links = self.models.values().flatten().flat_map(|log| &log.links);
        links.map(|link| link.speak_at).min()
    }
}

impl Log {
    fn new(part: Part, epoch: u64) -> Self {
        Log {
            part,
            epoch,
            names: BTreeSet::new(),
            sum: Sum::default(),
            events: VecDeque::new(),
            first: 0,
            links: Vec::new(),
        }
    }

    /// Keeps the links to those that stay owners. Who is none any more is left to forget this node.
    fn choose_owners(&mut self, now: Instant, members: &[NodeId], config: &ReporterConfig) {
        let owners = owners(&self.part, members, config.owners);
        self.links.retain(|link| owners.contains(&link.owner));
        for owner in owners {
            if !self.links.iter().any(|link| link.owner == owner) {
                self.links.push(Link::new(now, owner));
            }
        }
        self.forget_confirmed();
    }

    fn push(&mut self, now: Instant, event: (ShortName, bool), config: &ReporterConfig) {
        self.events.push_back(event);
        if self.events.len() > config.events_max {
            self.events.pop_front();
            self.first += 1;
        }
        let end = self.first + self.events.len() as u64;
        for link in &mut self.links {
            link.on_event(now, end, config);
        }
        if self.links.is_empty() {
            self.forget_confirmed();
        }
    }

    /// Forgets the events that every owner has, or will not need because it needs everything.
    fn forget_confirmed(&mut self) {
        let end = self.first + self.events.len() as u64;
        let needed = self.links.iter().filter_map(Link::needs).min();
        let confirmed = needed.unwrap_or(end).min(end).saturating_sub(self.first);
        self.events.drain(..confirmed as usize);
        self.first += confirmed;
        if self.events.is_empty() {
            self.events.shrink_to(EVENTS_KEPT);
        }
    }

    /// What the owner of that link must hear next, and where it stands then.
    fn report(&self, now: Instant, link: usize, config: &ReporterConfig) -> (Report, Known) {
        let link = &self.links[link];
        let end = self.first + self.events.len() as u64;
        // Known events that were not kept: from here on it is as if it knew nothing.
        let known = link.known.filter(|known| (self.first..=end).contains(&known.next));
        let Known { next, missing } =
            known.unwrap_or(Known { next: end, missing: Some(ShortName::FIRST) });
        let mut events = Events::default();
        let later = self.events.iter().skip((next - self.first) as usize);
        later.take(NAMES_MAX).for_each(|(name, removed)| events.push(*name, *removed));
        let is_last = next + events.len() as u64 == end;
        let piece = missing.filter(|_| is_last).map(|first| self.piece(first, config));
        let completes = piece.as_ref().is_some_and(|piece| piece.last == ShortName::LAST);
        let is_due = missing.is_none() && now >= link.refresh_at;
        let sum = (is_last && (completes || is_due)).then_some(self.sum);
        let missing = piece.as_ref().map_or(missing, |piece| piece.last.successor());
        let expected = Known { next: next + events.len() as u64, missing };
        let news = News::Blocks { first: next, events, piece, sum };
        (Report { part: self.part, epoch: self.epoch, news }, expected)
    }

    fn piece(&self, first: ShortName, config: &ReporterConfig) -> Piece {
        let names_max = config.piece_names.clamp(1, NAMES_MAX);
        let names: Vec<ShortName> = self.names.range(first..).take(names_max).copied().collect();
        let last = match names.last() {
            Some(last) if names.len() == names_max => *last,
            _ => ShortName::LAST,
        };
        Piece { first, last, names }
    }
}

impl Link {
    fn new(now: Instant, owner: NodeId) -> Self {
        Link {
            owner,
            known: None,
            call: None,
            speak_at: now,
            waits: false,
            strikes: 0,
            refresh_at: now,
        }
    }

    /// The first event that its owner may need.
    fn needs(&self) -> Option<u64> {
        let known = self.known.map(|known| known.next);
        known.or_else(|| self.call.as_ref().map(|call| call.expected.next))
    }

    fn on_event(&mut self, now: Instant, end: u64, config: &ReporterConfig) {
        if self.call.is_none() && !self.waits {
            let pending = self.known.map_or(0, |known| end.saturating_sub(known.next));
            let is_enough = pending >= config.batch_events as u64;
            let at = if is_enough { now } else { now + config.batch_wait };
            self.speak_at = self.speak_at.min(at);
        }
    }

    /// Learns where the owner stands; `None` if it has not said so. `end` is after the last event.
    fn on_answer(
        &mut self,
        now: Instant,
        heard: Option<Heard>,
        end: u64,
        config: &ReporterConfig,
        random: &mut Random,
    ) {
        let Some(Call { expected, .. }) = self.call.take() else { return };
        self.waits = false;
        let mut wait = Duration::ZERO;
        match heard {
            Some(Heard::Known { next, missing }) => {
                let known = Known { next, missing };
                self.known = Some(known);
                self.strikes = if known == expected { 0 } else { self.strikes + 1 };
                let pending = end.saturating_sub(next);
                if missing.is_none() && pending == 0 {
                    wait = self.refresh_at - now;
                } else if missing.is_none() && pending < config.batch_events as u64 {
                    wait = config.batch_wait;
                }
            }
            Some(Heard::Unknown) => {
                self.known = None;
                self.strikes += 1;
            }
            Some(Heard::Busy { retry_ms }) => {
                (self.known, self.waits) = (None, true);
                let least = config.retry_min.as_millis() as u32;
                let retry_ms = retry_ms.clamp(least, RETRY_MS_MAX);
                self.speak_at = now + Duration::from_millis(retry_ms.into());
                return;
            }
            None => self.strikes += 1,
        }
        // One surprise is answered at once, an owner that does not answer is not asked at once, and two
        // that do not understand each other do not shout.
        let patience = if heard.is_none() { 1 } else { 2 };
        if self.strikes >= patience {
            self.waits = true;
            let doubled = config.retry_min * (1 << (self.strikes - patience).min(16));
            wait = spread(doubled.min(config.retry_max), random);
        }
        self.speak_at = now + wait;
    }
}

impl ReporterStats {
    fn count(&mut self, report: &Report) {
        self.reports += 1;
        if let News::Blocks { events, piece, .. } = &report.news {
            self.events += events.len() as u64;
            self.dumped += piece.as_ref().map_or(0, |piece| piece.names.len() as u64);
        }
    }
}

fn next_call(calls: &mut u64) -> CallId {
    *calls += 1;
    CallId(*calls)
}

/// Half to one and a half of it, so that those that fell silent together do not speak together.
fn spread(wait: Duration, random: &mut Random) -> Duration {
    wait.mul_f64(0.5 + random.unit())
}

/// No owner can send a node away for longer.
const RETRY_MS_MAX: u32 = 120_000;
/// Room for events that is not given back.
const EVENTS_KEPT: usize = 1024;
