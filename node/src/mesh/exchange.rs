//! Runs the pure exchanges over a stream: bytes in, bytes out, deadlines kept.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use protocol::frame::Frame;
use protocol::identity::greeting::{Greeting, GreetingError, GreetingInput, GreetingOutput};
use protocol::identity::join::{
    Contact, Issuer, IssuerError, IssuerInput, IssuerOutput, IssuerPlace, JoinError, Joined,
    Joiner, JoinerInput, JoinerOutput, Purpose, Refusal,
};
use protocol::identity::{Certificate, SignedRecord};
use protocol::{Instant, Machine};

use super::frames::{FrameRate, FrameReader, FrameWriter, StreamError};
use super::identity::{Identity, Standing, serial};
use super::limits::MeshLimits;
use super::quic::Link;
use super::random;

/// A stream on which an exchange runs.
pub(crate) struct Exchange {
    pub reader: FrameReader,
    pub writer: FrameWriter,
    pub rate: FrameRate,
    pub limits: Arc<MeshLimits>,
    start: std::time::Instant,
}

/// What came in while an exchange waited.
enum Event {
    Frame(Frame),
    Timer,
    Closed,
}

impl Exchange {
    pub fn new(
        (send, receive): (quinn::SendStream, quinn::RecvStream),
        limits: Arc<MeshLimits>,
    ) -> Self {
        Exchange {
            reader: FrameReader::new(receive, limits.frame_bytes_max),
            writer: FrameWriter::new(send),
            rate: FrameRate::new(limits.frames_per_second_max),
            limits,
            start: std::time::Instant::now(),
        }
    }

    fn now(&self) -> Instant {
        Instant::ORIGIN + self.start.elapsed()
    }

    /// The next frame, the deadline, or the end of the stream; broken frames end it, too.
    async fn event(&mut self, deadline: Option<Instant>) -> (Event, Option<StreamError>) {
        let wait = deadline.map_or(self.limits.handshake_timeout, |d| d - self.now());
        match self.reader.next_within(&self.rate, wait).await {
            Ok(Some(frame)) => (Event::Frame(frame), None),
            Ok(None) => (Event::Closed, None),
            Err(StreamError::Timeout { .. }) => (Event::Timer, None),
            Err(error) => (Event::Closed, Some(error)),
        }
    }

    async fn send(&mut self, frame: &Frame) {
        // A peer that is gone or stalls is found out by the next wait.
        let _ = self.writer.send(frame, self.limits.stream_timeout).await;
    }

    /// Ends the stream and waits a moment until the peer has read it.
    async fn finish(&mut self) {
        self.writer.finish();
        self.writer.drained(FINISH_TIMEOUT).await;
    }
}

/// What an asking node learned.
pub(crate) enum Asked {
    Joined(Box<Joined>),
    Elsewhere(Vec<Contact>),
}

/// Asks the node at the other end of `link` for a certificate.
pub(crate) async fn ask(
    link: &Link,
    identity: &Identity,
    purpose: Purpose,
    limits: Arc<MeshLimits>,
) -> Result<Asked, JoinError> {
    let closed = JoinError::Closed { waiting: protocol::identity::join::Waiting::Proof };
    let opened = tokio::time::timeout(limits.stream_timeout, link.open()).await;
    let Ok(Ok(stream)) = opened else { return Err(closed) };
    let mut exchange = Exchange::new(stream, limits);
    let at = (link.peer(), link.binding());
    let key = identity.key().clone();
    let (mut joiner, hello) = Joiner::new(exchange.now(), purpose, key, at, random());
    exchange.send(&hello).await;
    let mut out = Vec::new();
    loop {
        let (event, _) = exchange.event(joiner.next_deadline()).await;
        let input = match event {
            Event::Frame(frame) => JoinerInput::Frame { frame, wall: identity.now() },
            Event::Timer => JoinerInput::Timer,
            Event::Closed => JoinerInput::Closed,
        };
        joiner.handle(exchange.now(), input, &mut out);
        for output in out.drain(..) {
            match output {
                JoinerOutput::Send(frame) => exchange.send(&frame).await,
                JoinerOutput::Joined(joined) => return Ok(Asked::Joined(joined)),
                JoinerOutput::Elsewhere(contacts) => return Ok(Asked::Elsewhere(contacts)),
                JoinerOutput::Failed(error) => return Err(error),
            }
        }
    }
}

/// How a join exchange ended on the side that was asked.
pub(crate) enum Answered {
    Granted(Certificate),
    Redirected,
    Failed(IssuerError),
}

/// Answers a node that asks for a certificate; `first` is the frame that it began with.
pub(crate) async fn answer(
    mut exchange: Exchange,
    link: &Link,
    identity: &Arc<Identity>,
    Standing { trust, certificate }: Standing,
    contacts: Vec<Contact>,
    first: Frame,
    mut redeem: impl FnMut(SignedRecord) -> BoxFuture<'static, Result<(), Refusal>> + Send,
) -> Answered {
    let place = IssuerPlace {
        key: identity.key().clone(),
        trust,
        certificate,
        contacts,
        nonce: random(),
        serial: serial(),
    };
    let mut issuer = Issuer::new(exchange.now(), place, (link.peer(), link.binding()));
    let mut inputs = vec![IssuerInput::Frame { frame: first, wall: identity.now() }];
    loop {
        let mut out = Vec::new();
        for input in inputs.drain(..) {
            issuer.handle(exchange.now(), input, &mut out);
        }
        for output in out {
            let answered = match output {
                IssuerOutput::Send(frame) => {
                    exchange.send(&frame).await;
                    continue;
                }
                IssuerOutput::Redeem(record) => {
                    let result = redeem(record).await;
                    inputs.push(IssuerInput::Redeemed { result, wall: identity.now() });
                    continue;
                }
                IssuerOutput::Granted(certificate) => Answered::Granted(certificate),
                IssuerOutput::Redirected => Answered::Redirected,
                IssuerOutput::Failed(error) => Answered::Failed(error),
            };
            exchange.finish().await;
            return answered;
        }
        if inputs.is_empty() {
            let (event, _) = exchange.event(issuer.next_deadline()).await;
            inputs.push(match event {
                Event::Frame(frame) => IssuerInput::Frame { frame, wall: identity.now() },
                Event::Timer => IssuerInput::Timer,
                Event::Closed => IssuerInput::Closed,
            });
        }
    }
}

/// Greets the peer; gives its certificate. `first` is the peer's frame, if it has been read already.
/// What is learned about authorities and revocations goes to `learn` at once.
pub(crate) async fn greet(
    exchange: &mut Exchange,
    link: &Link,
    identity: &Identity,
    standing: Standing,
    first: Option<Frame>,
    mut learn: impl FnMut(GreetingOutput) -> BoxFuture<'static, ()> + Send,
) -> Result<Certificate, GreetingError> {
    let trust = protocol::identity::Trust::clone(&standing.trust);
    let (mut greeting, hello) =
        Greeting::new(exchange.now(), trust, standing.certificate, link.peer());
    exchange.send(&hello).await;
    let mut first = first;
    loop {
        let event = match first.take() {
            Some(frame) => Event::Frame(frame),
            None => exchange.event(greeting.next_deadline()).await.0,
        };
        let input = match event {
            Event::Frame(frame) => GreetingInput::Frame { frame, wall: identity.now() },
            Event::Timer => GreetingInput::Timer,
            Event::Closed => GreetingInput::Closed,
        };
        let mut out = Vec::new();
        greeting.handle(exchange.now(), input, &mut out);
        for output in out {
            match output {
                GreetingOutput::Send(frame) => exchange.send(&frame).await,
                GreetingOutput::Accepted(certificate) => {
                    exchange.writer.finish();
                    return Ok(certificate);
                }
                GreetingOutput::Failed(error) => {
                    exchange.finish().await;
                    return Err(error);
                }
                learned => learn(learned).await,
            }
        }
    }
}

/// Time for the last frame of an exchange to arrive.
const FINISH_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(2);
