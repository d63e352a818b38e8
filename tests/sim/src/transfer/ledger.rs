//! What became of every request, and what was never to happen but did.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use protocol::RequestId;

use crate::actor::NodeIndex;

/// One book for the whole world; its nodes share it.
#[derive(Clone, Debug, Default)]
pub struct Ledger(Rc<RefCell<Book>>);

#[derive(Debug, Default)]
struct Book {
    broken: Vec<String>,
    requests: BTreeMap<RequestId, (NodeIndex, Option<Fate>)>,
    counts: Counts,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// With the right tokens: `fetched` blocks came from peers, `prefilled` ones were computed.
    Right {
        fetched: usize,
        prefilled: usize,
    },
    Cancelled,
    /// The pool was full until its time was over; an error that says so.
    NoRoom,
    /// Its node went down.
    Died,
}

impl Fate {
    pub fn word(self) -> &'static str {
        match self {
            Fate::Right { .. } => "right",
            Fate::Cancelled => "cancelled",
            Fate::NoRoom => "no room",
            Fate::Died => "died",
        }
    }
}

/// What happened, so that a test can tell that it did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub attempts: u64,
    /// Attempts that failed, by the first word of why.
    pub failed: BTreeMap<String, u64>,
    /// Hand-offs by how they ended.
    pub handoffs: BTreeMap<String, u64>,
    /// Blocks that came from peers and were attached.
    pub fetched: u64,
    /// Attempts that began after others of their hand-off had brought some blocks.
    pub resumed: u64,
    pub stopped_streams: u64,
    /// Pages that waited because their stream had no room.
    pub blocked: u64,
}

impl Counts {
    pub fn add(&mut self, other: &Counts) {
        self.attempts += other.attempts;
        self.fetched += other.fetched;
        self.resumed += other.resumed;
        self.stopped_streams += other.stopped_streams;
        self.blocked += other.blocked;
        for (ours, theirs) in
            [(&mut self.failed, &other.failed), (&mut self.handoffs, &other.handoffs)]
        {
            for (word, n) in theirs {
                *ours.entry(word.clone()).or_default() += n;
            }
        }
    }
}

impl Ledger {
    pub fn broken(&self, node: NodeIndex, what: fmt::Arguments<'_>) {
        self.0.borrow_mut().broken.push(format!("node {node}: {what}"));
    }

    pub fn take_broken(&self) -> Vec<String> {
        std::mem::take(&mut self.0.borrow_mut().broken)
    }

    pub fn is_sound(&self) -> bool {
        self.0.borrow().broken.is_empty()
    }

    pub fn count(&self, count: impl FnOnce(&mut Counts)) {
        count(&mut self.0.borrow_mut().counts);
    }

    pub fn counts(&self) -> Counts {
        self.0.borrow().counts.clone()
    }

    pub fn begin(&self, request: RequestId, node: NodeIndex) {
        self.0.borrow_mut().requests.insert(request, (node, None));
    }

    pub fn end(&self, request: RequestId, fate: Fate) {
        let mut book = self.0.borrow_mut();
        let Some((node, ended)) = book.requests.get_mut(&request) else { return };
        let (node, before) = (*node, ended.replace(fate));
        if before.is_some() {
            book.broken.push(format!("node {node}: {request} ended twice"));
        }
    }

    /// The node is down, and with it every request that it had not ended.
    pub fn died(&self, node: NodeIndex) {
        for (on, fate) in self.0.borrow_mut().requests.values_mut() {
            if *on == node && fate.is_none() {
                *fate = Some(Fate::Died);
            }
        }
    }

    /// Every request with its fate, `None` if it waits.
    pub fn fates(&self) -> BTreeMap<RequestId, Option<Fate>> {
        self.0.borrow().requests.iter().map(|(id, (_, fate))| (*id, *fate)).collect()
    }
}
