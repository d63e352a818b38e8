//! What of a stream has been seen, so that nothing is lost or doubled when it goes on elsewhere.
//!
//! Nodes number the events of a stream through, whoever sends them: this checks the numbers. An event
//! that was seen is dropped, a gap is an error, and what cannot be read counts as not seen.

use std::fmt;
use std::str::FromStr;

use protocol::RequestId;
use serde::de::DeserializeOwned;

use crate::sse::Frame;

/// The id of one event of a stream, as nodes write it: `<request>:<number>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventId {
    pub request: RequestId,
    /// Counted from 0.
    pub number: u64,
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.request, self.number)
    }
}

impl FromStr for EventId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (request, number) = text.rsplit_once(':').ok_or(())?;
        // `parse` would take a sign.
        if !number.bytes().all(|b| b.is_ascii_digit()) {
            return Err(());
        }
        Ok(EventId { request: request.parse()?, number: number.parse().map_err(|_| ())? })
    }
}

/// How far a stream is.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    last: Option<EventId>,
}

/// What an event is.
#[derive(Debug, PartialEq)]
pub(crate) enum Heard<C> {
    Chunk(EventId, C),
    /// The end of a whole answer.
    Done,
    /// The end of a failed one: the JSON of its error.
    Failed(String),
    /// Nothing new.
    Nothing,
}

/// Why an event is none that may come here. The stream before it is good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Garbled {
    #[error("an event without an id")]
    NoId,
    #[error("an event with the id {0:?}")]
    Id(String),
    #[error("event {got} where event {expected} of the stream was next")]
    Order { got: EventId, expected: u64 },
    #[error("an event that is no chunk: {0}")]
    Json(String),
}

impl Seen {
    /// The last event that was seen.
    pub fn last(&self) -> Option<EventId> {
        self.last
    }

    /// Reads an event, and counts it as seen if it is the next one.
    ///
    /// # Errors
    /// If it is not; nothing has changed.
    pub fn hear<C: DeserializeOwned>(&mut self, frame: Frame) -> Result<Heard<C>, Garbled> {
        match frame.name.as_str() {
            "error" => return Ok(Heard::Failed(frame.data)),
            "" | "message" => {}
            // Other names are for other readers.
            _ => return Ok(Heard::Nothing),
        }
        let id = frame.id.ok_or(Garbled::NoId)?;
        let id = id.parse::<EventId>().map_err(|()| Garbled::Id(id))?;
        if !self.is_next(id)? {
            return Ok(Heard::Nothing);
        }
        let heard = match frame.data.as_str() {
            "[DONE]" => Heard::Done,
            data => match serde_json::from_str(data) {
                Ok(chunk) => Heard::Chunk(id, chunk),
                Err(error) => return Err(Garbled::Json(error.to_string())),
            },
        };
        self.last = Some(id);
        Ok(heard)
    }

    /// Whether an event is the next; false if it has been seen.
    fn is_next(&self, got: EventId) -> Result<bool, Garbled> {
        let expected = self.last.map_or(0, |last| last.number.saturating_add(1));
        let is_ours = self.last.is_none_or(|last| last.request == got.request);
        match is_ours && got.number <= expected {
            true => Ok(got.number == expected),
            false => Err(Garbled::Order { got, expected }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(id: &str, data: &str) -> Frame {
        let id = (!id.is_empty()).then(|| id.to_owned());
        Frame { name: String::new(), id, data: data.to_owned() }
    }

    fn id(request: u128, number: u64) -> String {
        EventId { request: RequestId(request), number }.to_string()
    }

    #[test]
    fn ids() {
        let good = id(1, 17);
        assert_eq!(good, "req-00000000000000000000000000000001:17");
        assert_eq!(good.parse::<EventId>().unwrap().to_string(), good);
        for bad in [
            "",
            "17",
            "req-1:1",
            &id(1, 1)[..36],
            &good.replace("17", "+17"),
            &good.replace("17", ""),
        ] {
            assert!(bad.parse::<EventId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn each_event_once_and_in_order() {
        let mut seen = Seen::default();
        let order =
            |got: &str, expected| Err(Garbled::Order { got: got.parse().unwrap(), expected });
        for (frame, expect) in [
            (frame(&id(1, 1), "0"), order(&id(1, 1), 0)),
            (frame(&id(1, 0), "10"), Ok(Heard::Chunk(id(1, 0).parse().unwrap(), 10))),
            (frame(&id(1, 0), "10"), Ok(Heard::Nothing)),
            (frame(&id(1, 2), "12"), order(&id(1, 2), 1)),
            (frame(&id(2, 1), "11"), order(&id(2, 1), 1)),
            (frame(&id(2, 0), "11"), order(&id(2, 0), 1)),
            (frame("", "11"), Err(Garbled::NoId)),
            (frame("x", "11"), Err(Garbled::Id("x".to_owned()))),
            (Frame { name: "ping".to_owned(), ..frame("", "") }, Ok(Heard::Nothing)),
            (
                Frame { name: "message".to_owned(), ..frame(&id(1, 1), "11") },
                Ok(Heard::Chunk(id(1, 1).parse().unwrap(), 11)),
            ),
            (
                Frame { name: "error".to_owned(), ..frame("", "{}") },
                Ok(Heard::Failed("{}".to_owned())),
            ),
        ] {
            assert_eq!(seen.hear::<u32>(frame.clone()), expect, "{frame:?}");
        }
        // What cannot be read is not seen.
        assert!(matches!(seen.hear::<u32>(frame(&id(1, 2), "{\"")), Err(Garbled::Json(_))));
        assert_eq!(seen.last(), id(1, 1).parse().ok());
        assert_eq!(seen.hear::<u32>(frame(&id(1, 2), "[DONE]")), Ok(Heard::Done));
        assert_eq!(seen.last(), id(1, 2).parse().ok());
    }
}
