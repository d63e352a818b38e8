//! What a stream writes down while it runs, for whoever goes on with it when this node dies.
//!
//! [`Generation`](super::generation::Generation) writes each event before it is shown, the stream of
//! events says how far it has come; who carries the stream takes both with each piece of text.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use engine::replica::{Event, FinishReason, Resumed};
use engine::sampler::SampledToken;
use protocol::api::ErrorCode;
use protocol::journal::{Ended, Entry, StreamPart};

use crate::mesh::{CODE_FAILED, CODE_TAKEN_OVER};
use crate::replica::PartEvent;

/// The journal of one stream, on the node that generates it.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    /// What other replicas have drawn for the request.
    before: Vec<Entry>,
    /// The number of the first event that is wanted.
    first_event: u64,
    fresh: Mutex<Fresh>,
}

/// What nobody has taken yet.
#[derive(Debug, Default)]
struct Fresh {
    entries: Vec<Entry>,
    /// Number of the event after those written.
    next_event: u64,
    /// Why the stream failed, if it did.
    failed: Option<ErrorCode>,
}

impl Journal {
    pub fn new(before: Vec<Entry>, first_event: u64) -> Self {
        Journal { before, first_event, fresh: Mutex::default() }
    }

    pub fn before(&self) -> &[Entry] {
        &self.before
    }

    pub fn first_event(&self) -> u64 {
        self.first_event
    }

    pub fn record(&self, entry: Entry) {
        self.edit(|fresh| fresh.entries.push(entry));
    }

    pub fn written(&self, next_event: u64) {
        self.edit(|fresh| fresh.next_event = next_event);
    }

    pub fn failed(&self, code: ErrorCode) {
        self.edit(|fresh| fresh.failed = Some(code));
    }

    /// The text that stands in a body's piece, with what was written down for it.
    pub fn part(&self, text: Bytes) -> StreamPart {
        self.edit(|fresh| StreamPart {
            is_whole: true,
            next_event: fresh.next_event,
            entries: std::mem::take(&mut fresh.entries),
            text: text.into(),
        })
    }

    /// Why the stream ended though it can go on, if it did: for a call's error, code and words.
    pub fn broken_off(&self) -> Option<(u16, &'static str)> {
        match self.edit(|fresh| fresh.failed) {
            Some(ErrorCode::ShuttingDown) => Some((CODE_FAILED, "this node is shutting down")),
            // The node that asked last has it; the one before goes on if its client is still there.
            Some(ErrorCode::NodeLost) => {
                Some((CODE_TAKEN_OVER, "another node has asked for the same answer"))
            }
            _ => None,
        }
    }

    fn edit<T>(&self, change: impl FnOnce(&mut Fresh) -> T) -> T {
        change(&mut self.fresh.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What the replica needs of a journal, for each of `choices` choices. `None` if it names others.
pub(super) fn resumed(before: &[Entry], choices: usize) -> Option<Vec<Resumed>> {
    let mut all = vec![Resumed::default(); choices];
    for entry in before {
        match entry {
            Entry::Started { .. } => {}
            Entry::Token { choice, token, logprob, top } => {
                let sampled = SampledToken { token: *token, logprob: *logprob, top: top.clone() };
                all.get_mut(*choice as usize)?.tokens.push(sampled);
            }
            Entry::Finished { choice, reason } => {
                all.get_mut(*choice as usize)?.finished = Some(match reason {
                    Ended::Stop => FinishReason::Stop,
                    Ended::Length => FinishReason::Length,
                });
            }
        }
    }
    Some(all)
}

/// The entry of an event; `None` of those that leave nothing to go on with.
pub(super) fn entry(part: usize, choices_per_part: usize, event: &Event) -> Option<Entry> {
    let number = |choice: usize| (part * choices_per_part + choice) as u32;
    match event {
        Event::Started { cached_tokens, .. } => {
            Some(Entry::Started { prompt: part as u32, cached_tokens: *cached_tokens as u64 })
        }
        Event::Token { choice, sampled, .. } => Some(Entry::Token {
            choice: number(*choice),
            token: sampled.token,
            logprob: sampled.logprob,
            top: sampled.top.clone(),
        }),
        Event::Finished { choice, reason, .. } => {
            let reason = match reason {
                FinishReason::Stop => Ended::Stop,
                FinishReason::Length => Ended::Length,
            };
            Some(Entry::Finished { choice: number(*choice), reason })
        }
        Event::Embedding { .. } | Event::Scores { .. } | Event::Failed { .. } => None,
    }
}

/// Events that the replica gave choice by choice, in the order of the journal; those that do not
/// stand in it come last. Each with whether it stands there.
pub(super) fn in_order(
    before: &[Entry],
    choices_per_part: usize,
    replayed: Vec<PartEvent>,
) -> impl Iterator<Item = (PartEvent, bool)> {
    let number = |part: usize, event: &Event| match event {
        Event::Token { choice, .. } | Event::Finished { choice, .. } => {
            part * choices_per_part + choice
        }
        _ => part * choices_per_part,
    };
    let mut of_choice: BTreeMap<usize, VecDeque<PartEvent>> = BTreeMap::new();
    for (part, event) in replayed {
        of_choice.entry(number(part, &event)).or_default().push_back((part, event));
    }
    let mut ordered = Vec::new();
    for entry in before {
        let (Entry::Token { choice, .. } | Entry::Finished { choice, .. }) = entry else {
            continue;
        };
        let next = of_choice.get_mut(&(*choice as usize)).and_then(VecDeque::pop_front);
        ordered.extend(next.map(|event| (event, true)));
    }
    let rest = of_choice.into_values().flatten().map(|event| (event, false));
    ordered.into_iter().chain(rest)
}
