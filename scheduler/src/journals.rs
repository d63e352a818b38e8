//! Copies of other nodes' streams: what is kept, for how long, and what goes first.
//!
//! Owns the bounds. An ingress sends each stream's request once and its entries as they come; a stream
//! of which nothing is heard for a while is forgotten, since its client has come back elsewhere or not at
//! all. Refuses to know who is alive or who may ask: the shell has asked.

use std::collections::BTreeMap;

use protocol::backup::{Begin, Fetched, Keep, Kept};
use protocol::journal::{Entry, JOURNAL_BYTES_MAX};
use protocol::{Duration, Instant, NodeId, RequestId, TenantId};

/// What an operator may set, and what a wrong value does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalsConfig {
    /// Unit: bytes of requests and entries of all streams. Formula: `streams of the mesh / nodes x bytes
    /// of a stream` (a prompt and 16 bytes a token). Too small: streams die with their ingress. Too
    /// large: memory that the cache could use. Default 256 MiB.
    pub bytes_max: usize,
    /// Unit: bytes of the streams that one member has sent here; what goes beyond is not kept. Too small:
    /// streams of a busy ingress die with it. Too large: one member takes the memory from the others.
    /// Default 64 MiB.
    pub bytes_per_member_max: usize,
    /// Unit: time since the last word of a stream that is not complete; its ingress says something each
    /// 30 s. Too small: streams are forgotten before their clients come back. Too large: dead streams
    /// fill the memory. Default 2 min.
    pub silent_for: Duration,
    /// Unit: time that a complete stream is kept for a client that has not seen its end. Default 30 s.
    pub complete_for: Duration,
}

impl Default for JournalsConfig {
    fn default() -> Self {
        JournalsConfig {
            bytes_max: 256 << 20,
            bytes_per_member_max: 64 << 20,
            silent_for: Duration::from_secs(120),
            complete_for: Duration::from_secs(30),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Journals {
    config: JournalsConfig,
    streams: BTreeMap<Key, Stream>,
    bytes: usize,
    /// Of them, those of each member that has any.
    by_member: BTreeMap<NodeId, usize>,
    /// When old streams are looked for again.
    sweep_at: Instant,
}

type Key = (TenantId, RequestId);

#[derive(Debug)]
struct Stream {
    /// Who has sent its beginning: all of it counts as that member's.
    member: NodeId,
    begin: Begin,
    entries: Vec<Entry>,
    bytes: usize,
    forget_at: Instant,
}

impl Journals {
    pub fn new(config: JournalsConfig) -> Self {
        let (streams, by_member) = (BTreeMap::new(), BTreeMap::new());
        Journals { config, streams, bytes: 0, by_member, sweep_at: Instant::ORIGIN }
    }

    /// Takes more of a stream from a member.
    pub fn keep(&mut self, now: Instant, member: NodeId, tenant: TenantId, message: Keep) -> Kept {
        self.forget_old(now);
        let Keep { request, begin, from, entries, is_complete, .. } = message;
        let key = (tenant, RequestId(request));
        if let Some(begin) = begin {
            self.remove(&key);
            let bytes = STREAM_BYTES + begin.body.len();
            if !self.has_room(member, bytes) {
                return Kept::Full;
            }
            self.count(member, bytes);
            let stream = Stream { member, begin, entries: Vec::new(), bytes, forget_at: now };
            self.streams.insert(key.clone(), stream);
        }
        let Some(stream) = self.streams.get_mut(&key) else { return Kept::Unknown };
        let keep_for = if is_complete { self.config.complete_for } else { self.config.silent_for };
        stream.forget_at = now + keep_for;
        // What comes again is what is here: an ingress that has not heard the answer says it again.
        let known = stream.entries.len() as u64;
        let Some(skip) = known.checked_sub(from) else { return Kept::Entries(known) };
        let new = entries.get(usize::try_from(skip).unwrap_or(usize::MAX)..).unwrap_or_default();
        let bytes: usize = new.iter().map(entry_bytes).sum();
        let (member, stream_bytes) = (stream.member, stream.bytes + bytes);
        if stream_bytes > STREAM_BYTES_MAX || !self.has_room(member, bytes) {
            self.remove(&key);
            return Kept::Full;
        }
        self.count(member, bytes);
        let stream = self.streams.get_mut(&key).expect("looked at above");
        stream.bytes = stream_bytes;
        stream.entries.extend_from_slice(new);
        Kept::Entries(stream.entries.len() as u64)
    }

    /// What is kept of a stream, from an entry on, at most `entries_max` of them.
    pub fn fetch(&self, key: &Key, from: u64, entries_max: usize) -> Option<Fetched> {
        let stream = self.streams.get(key)?;
        let start = usize::try_from(from).unwrap_or(usize::MAX).min(stream.entries.len());
        let entries = stream.entries[start..].iter().take(entries_max).cloned().collect();
        let begin = (from == 0).then(|| stream.begin.clone());
        Some(Fetched { begin, entries, total: stream.entries.len() as u64 })
    }

    /// Streams kept, and their bytes.
    pub fn size(&self) -> (usize, usize) {
        (self.streams.len(), self.bytes)
    }

    fn remove(&mut self, key: &Key) {
        if let Some(stream) = self.streams.remove(key) {
            self.uncount(stream.member, stream.bytes);
        }
    }

    fn has_room(&self, member: NodeId, bytes: usize) -> bool {
        let of_member = self.by_member.get(&member).copied().unwrap_or(0);
        self.bytes + bytes <= self.config.bytes_max
            && of_member + bytes <= self.config.bytes_per_member_max
    }

    fn count(&mut self, member: NodeId, bytes: usize) {
        self.bytes += bytes;
        *self.by_member.entry(member).or_default() += bytes;
    }

    fn uncount(&mut self, member: NodeId, bytes: usize) {
        self.bytes -= bytes;
        if let Some(of_member) = self.by_member.get_mut(&member) {
            *of_member -= bytes;
            if *of_member == 0 {
                self.by_member.remove(&member);
            }
        }
    }

    fn forget_old(&mut self, now: Instant) {
        if now < self.sweep_at {
            return;
        }
        self.sweep_at = now + SWEEP;
        let mut forgotten = Vec::new();
        self.streams.retain(|_, stream| {
            let kept = stream.forget_at > now;
            if !kept {
                forgotten.push((stream.member, stream.bytes));
            }
            kept
        });
        for (member, bytes) in forgotten {
            self.uncount(member, bytes);
        }
    }
}

fn entry_bytes(entry: &Entry) -> usize {
    size_of::<Entry>()
        + match entry {
            Entry::Token { top, .. } => top.len() * size_of::<(u32, f32)>(),
            Entry::Started { .. } | Entry::Finished { .. } => 0,
        }
}

/// What a stream without anything takes, about.
const STREAM_BYTES: usize = 512;
/// One stream may not take the place of all.
const STREAM_BYTES_MAX: usize = 4 * JOURNAL_BYTES_MAX;
const SWEEP: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::forward::Endpoint;
    use protocol::journal::Ended;

    const BODY: usize = 1000;
    const ONE: NodeId = NodeId([1; 32]);
    const TWO: NodeId = NodeId([2; 32]);

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).expect("a name")
    }

    fn at(ms: u64) -> Instant {
        Instant::ORIGIN + Duration::from_millis(ms)
    }

    fn token(token: u32) -> Entry {
        Entry::Token { choice: 0, token, logprob: 0.0, top: Vec::new() }
    }

    fn message(begins: bool, from: u64, tokens: std::ops::Range<u32>) -> Keep {
        let begin =
            Begin { endpoint: Endpoint::Chat, created: 1, weights: 2, body: vec![b'x'; BODY] };
        Keep {
            tenant: "a".to_owned(),
            request: 1 << 12,
            begin: begins.then_some(begin),
            from,
            entries: tokens.map(token).collect(),
            is_complete: false,
        }
    }

    fn fetch(journals: &Journals, tenant_name: &str, from: u64) -> Option<(usize, u64)> {
        let key = (tenant(tenant_name), RequestId(1 << 12));
        journals.fetch(&key, from, 100).map(|found| (found.entries.len(), found.total))
    }

    #[test]
    fn entries_come_once_and_in_order() {
        let mut journals = Journals::new(JournalsConfig::default());
        let a = || tenant("a");
        assert_eq!(journals.keep(at(0), ONE, a(), message(false, 0, 0..2)), Kept::Unknown);
        assert_eq!(journals.keep(at(0), ONE, a(), message(true, 0, 0..2)), Kept::Entries(2));
        // The answer was lost and the ingress says it again, with more.
        assert_eq!(journals.keep(at(1), ONE, a(), message(false, 1, 1..5)), Kept::Entries(5));
        assert_eq!(journals.keep(at(1), ONE, a(), message(false, 0, 0..3)), Kept::Entries(5));
        // A gap is not taken.
        assert_eq!(journals.keep(at(2), ONE, a(), message(false, 7, 7..9)), Kept::Entries(5));
        let key = (a(), RequestId(1 << 12));
        let found = journals.fetch(&key, 3, 1).expect("kept");
        assert_eq!((found.begin, found.entries, found.total), (None, vec![token(3)], 5));
        assert!(journals.fetch(&key, 0, 9).expect("kept").begin.is_some());
        assert_eq!(fetch(&journals, "a", u64::MAX), Some((0, 5)));
        // Nobody else's, whatever its request is called.
        assert_eq!(fetch(&journals, "b", 0), None);
        // Another ingress takes the stream over.
        assert_eq!(journals.keep(at(3), ONE, a(), message(true, 0, 0..1)), Kept::Entries(1));
    }

    #[test]
    fn what_is_silent_is_forgotten() {
        let mut journals = Journals::new(JournalsConfig::default());
        journals.keep(at(0), ONE, tenant("a"), message(true, 0, 0..2));
        let other = |journals: &mut Journals, ms| {
            journals.keep(at(ms), ONE, tenant("b"), message(true, 0, 0..1));
        };
        other(&mut journals, 119_000);
        assert_eq!(fetch(&journals, "a", 0), Some((2, 2)));
        let mut end = message(false, 2, 0..0);
        end.entries = vec![Entry::Finished { choice: 0, reason: Ended::Stop }];
        end.is_complete = true;
        assert_eq!(journals.keep(at(119_500), ONE, tenant("a"), end), Kept::Entries(3));
        other(&mut journals, 149_000);
        assert_eq!(fetch(&journals, "a", 0), Some((3, 3)));
        other(&mut journals, 151_001);
        assert_eq!(fetch(&journals, "a", 0), None);
        journals.keep(at(2_000_000), ONE, tenant("c"), message(false, 0, 0..0));
        assert_eq!(journals.size(), (0, 0));
    }

    #[test]
    fn memory_is_bounded() {
        let mut journals =
            Journals::new(JournalsConfig { bytes_max: 5_000, ..JournalsConfig::default() });
        let named = |n: u32| tenant(&format!("t{n}"));
        let kept: Vec<Kept> =
            (0..5).map(|n| journals.keep(at(0), ONE, named(n), message(true, 0, 0..0))).collect();
        assert_eq!(kept[..3], [Kept::Entries(0); 3]);
        assert_eq!(kept[3..], [Kept::Full; 2]);
        assert_eq!(journals.keep(at(1), ONE, named(0), message(false, 0, 0..1000)), Kept::Full);
        assert_eq!(journals.size(), (2, 2 * (STREAM_BYTES + BODY)));
    }
    #[test]
    fn a_member_has_a_share() {
        let each = STREAM_BYTES + BODY;
        let config = JournalsConfig {
            bytes_max: 5 * each,
            bytes_per_member_max: 2 * each,
            ..JournalsConfig::default()
        };
        let mut journals = Journals::new(config);
        let mut n = 0;
        let mut begins = |journals: &mut Journals, ms, member| {
            n += 1;
            let tenant = tenant(&format!("t{n}"));
            journals.keep(at(ms), member, tenant, message(true, 0, 0..0)) == Kept::Entries(0)
        };
        let taken: Vec<bool> = (0..3).map(|_| begins(&mut journals, 0, ONE)).collect();
        assert_eq!(taken, [true, true, false]);
        assert!(begins(&mut journals, 0, TWO), "others have room");
        // What it adds to its own streams counts, too, and costs it that stream only.
        assert_eq!(journals.keep(at(1), ONE, tenant("t1"), message(false, 0, 0..1)), Kept::Full);
        assert_eq!(journals.size(), (2, 2 * each));
        assert!(begins(&mut journals, 1, ONE));
        // A stream that another member takes over is that one's.
        assert_eq!(
            journals.keep(at(2), TWO, tenant("t2"), message(true, 0, 0..0)),
            Kept::Entries(0)
        );
        assert!(begins(&mut journals, 2, ONE));
        assert!(!begins(&mut journals, 2, TWO));
        // What is forgotten counts no more.
        assert!(begins(&mut journals, 500_000, ONE));
        assert!(begins(&mut journals, 500_000, ONE));
        assert_eq!(journals.by_member, BTreeMap::from([(ONE, 2 * each)]));
    }
}
