//! What two members say first on a connection: who they are, and what they know of the authorities.
//!
//! ```text
//! both   hello {certificate, epoch and hash of the newest authority set, digest of the revocations}
//! both   chain and revocations, if the two differ
//! both   welcome, or refusal {reason}
//! ```
//!
//! TLS has proved that the peer holds its node key; the certificate names that key. Nothing else is
//! served on the connection before both have said welcome.

use bincode::{Decode, Encode};

use crate::frame::{Frame, Kind};
use crate::wire::DecodeError;
use crate::{Duration, Instant, Machine, NodeId};

use super::authority::{AuthorityChain, AuthorityError, SetHash, SignedSet};
use super::certificate::{Certificate, CertificateError};
use super::join::{JOIN_FRAME_BYTES_MAX, Refusal, Violation, Waiting};
use super::revocation::{RevocationError, SignedRevocation};
use super::trust::Trust;
use super::unix_time::UnixTime;

/// The first frame of either side.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct PeerHello {
    pub certificate: Certificate,
    pub head: SetHash,
    pub revocations: [u8; 32],
}

/// What a greeting is told.
#[derive(Clone, Debug)]
pub enum GreetingInput {
    Frame { frame: Frame, wall: UnixTime },
    Timer,
    Closed,
}

/// What its shell must do.
#[derive(Clone, Debug)]
pub enum GreetingOutput {
    Send(Frame),
    /// The peer knows other authority sets, checked: merge them into what this node knows.
    Chain(AuthorityChain),
    /// The peer knows other revocations: merge them.
    Revocations(Vec<SignedRevocation>),
    /// Both are members; over.
    Accepted(Certificate),
    /// Over.
    Failed(GreetingError),
}

/// A greeting; the same for the side that dialled and the other.
#[derive(Debug)]
pub struct Greeting {
    trust: Trust,
    peer: NodeId,
    certificate: Option<Certificate>,
    chain_missing: bool,
    revocations_missing: bool,
    welcome_sent: bool,
    welcome_heard: bool,
    deadline: Option<Instant>,
}

impl Greeting {
    /// Begins: the frame is to be sent first. `peer` is who TLS says is there.
    pub fn new(
        now: Instant,
        trust: Trust,
        certificate: Certificate,
        peer: NodeId,
    ) -> (Greeting, Frame) {
        let hello = PeerHello {
            certificate,
            head: trust.head(),
            revocations: trust.revocations().digest(),
        };
        let greeting = Greeting {
            trust,
            peer,
            certificate: None,
            chain_missing: false,
            revocations_missing: false,
            welcome_sent: false,
            welcome_heard: false,
            deadline: Some(now + GREETING_WAIT),
        };
        (greeting, Frame::new(Kind::PEER_HELLO, &hello))
    }

    fn on_frame(
        &mut self,
        frame: Frame,
        wall: UnixTime,
        out: &mut Vec<GreetingOutput>,
    ) -> Result<(), GreetingError> {
        match frame.kind {
            Kind::PEER_HELLO if self.certificate.is_none() => self.on_hello(value(&frame)?, out),
            Kind::PEER_CHAIN if self.chain_missing => {
                let links: Vec<SignedSet> = value(&frame)?;
                let chain = AuthorityChain::verify(self.trust.root(), links)?;
                self.chain_missing = false;
                if self.trust.merge_chain(chain.clone())? {
                    out.push(GreetingOutput::Chain(chain));
                }
            }
            Kind::PEER_REVOCATIONS if self.revocations_missing && !self.chain_missing => {
                let events: Vec<SignedRevocation> = value(&frame)?;
                self.revocations_missing = false;
                if self.trust.merge_revocations(events.clone(), wall)? > 0 {
                    out.push(GreetingOutput::Revocations(events));
                }
            }
            Kind::PEER_WELCOME if self.certificate.is_some() && !self.welcome_heard => {
                self.welcome_heard = true;
            }
            Kind::PEER_REFUSAL => return Err(GreetingError::Refused(value(&frame)?)),
            kind => {
                let waiting = Waiting::Hello;
                return Err(Violation::Unexpected { kind: kind.0, waiting }.into());
            }
        }
        self.conclude(wall, out)
    }

    fn on_hello(&mut self, hello: PeerHello, out: &mut Vec<GreetingOutput>) {
        if hello.head != self.trust.head() {
            self.chain_missing = true;
            let links = self.trust.chain().links().to_vec();
            out.push(GreetingOutput::Send(Frame::new(Kind::PEER_CHAIN, &links)));
        }
        if hello.revocations != self.trust.revocations().digest() {
            self.revocations_missing = true;
            let events: Vec<_> = self.trust.revocations().iter().cloned().collect();
            out.push(GreetingOutput::Send(Frame::new(Kind::PEER_REVOCATIONS, &events)));
        }
        self.certificate = Some(hello.certificate);
    }

    /// Judges the certificate once everything that it depends on has come.
    fn conclude(
        &mut self,
        wall: UnixTime,
        out: &mut Vec<GreetingOutput>,
    ) -> Result<(), GreetingError> {
        let Some(certificate) = &self.certificate else { return Ok(()) };
        if self.chain_missing || self.revocations_missing {
            return Ok(());
        }
        if !self.welcome_sent {
            self.trust.check(certificate, self.peer, wall)?;
            self.welcome_sent = true;
            out.push(GreetingOutput::Send(Frame::new(Kind::PEER_WELCOME, &())));
        }
        if self.welcome_heard {
            out.push(GreetingOutput::Accepted(certificate.clone()));
            self.deadline = None;
        }
        Ok(())
    }
}

impl Machine for Greeting {
    type Input = GreetingInput;
    type Output = GreetingOutput;

    fn handle(&mut self, now: Instant, input: GreetingInput, out: &mut Vec<GreetingOutput>) {
        let Some(deadline) = self.deadline else { return };
        let handled = match input {
            GreetingInput::Frame { frame, .. } if frame.kind.is_optional() => return,
            GreetingInput::Frame { frame, wall } => self.on_frame(frame, wall, out),
            GreetingInput::Timer if now >= deadline => {
                Err(GreetingError::Timeout { after: GREETING_WAIT })
            }
            GreetingInput::Timer => return,
            GreetingInput::Closed => Err(GreetingError::Closed),
        };
        if let Err(error) = handled {
            if let Some(refusal) = error.told() {
                out.push(GreetingOutput::Send(Frame::new(Kind::PEER_REFUSAL, &refusal)));
            }
            out.push(GreetingOutput::Failed(error));
            self.deadline = None;
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.deadline
    }
}

/// Why a peer is no member as far as this node knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GreetingError {
    #[error("the peer's certificate is refused: {0}")]
    Certificate(#[from] CertificateError),
    #[error("the peer's authority chain is refused: {0}")]
    Authority(#[from] AuthorityError),
    #[error("the peer's revocations are refused: {0}")]
    Revocation(#[from] RevocationError),
    #[error("the peer refused this node: {0}")]
    Refused(Refusal),
    #[error("the peer broke the protocol: {0}")]
    Violation(#[from] Violation),
    #[error("the greeting took more than {} s", after.as_secs())]
    Timeout { after: Duration },
    #[error("the connection ended during the greeting")]
    Closed,
}

impl GreetingError {
    /// What the peer is told.
    fn told(&self) -> Option<Refusal> {
        Some(match self {
            GreetingError::Certificate(error) => error.into(),
            GreetingError::Authority(AuthorityError::OtherMesh { .. }) => Refusal::OtherMesh,
            GreetingError::Authority(_) | GreetingError::Revocation(_) => Refusal::Forged,
            GreetingError::Violation(_) | GreetingError::Timeout { .. } => Refusal::Protocol,
            GreetingError::Refused(_) | GreetingError::Closed => return None,
        })
    }
}

fn value<T: Decode<()>>(frame: &Frame) -> Result<T, Violation> {
    frame
        .value::<T, JOIN_FRAME_BYTES_MAX>()
        .map_err(|source| Violation::Malformed { kind: frame.kind.0, source })
}

/// Decodes a frame of a greeting; other kinds pass.
pub(super) fn decode_any(frame: &Frame) -> Result<(), DecodeError> {
    const LIMIT: usize = JOIN_FRAME_BYTES_MAX;
    match frame.kind {
        Kind::PEER_HELLO => frame.value::<PeerHello, LIMIT>().map(drop),
        Kind::PEER_CHAIN => frame.value::<Vec<SignedSet>, LIMIT>().map(drop),
        Kind::PEER_REVOCATIONS => frame.value::<Vec<SignedRevocation>, LIMIT>().map(drop),
        Kind::PEER_WELCOME => frame.value::<(), LIMIT>(),
        Kind::PEER_REFUSAL => frame.value::<Refusal, LIMIT>().map(drop),
        _ => Ok(()),
    }
}

/// Time for a whole greeting. Too small: slow links stay apart. Too large: silent peers hold places.
pub const GREETING_WAIT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::super::Roles;
    use super::super::testing::{NOW, key, mutations, trust};
    use super::*;
    use crate::wire;

    const START: Instant = Instant::ORIGIN;

    fn side(trust: &Trust, me: u8, peer: u8) -> (Greeting, Frame) {
        let issuer = key(1);
        let certificate = trust.issue(&issuer, key(me).id(), Roles::ALL, 7, NOW).unwrap();
        Greeting::new(START, trust.clone(), certificate, key(peer).id())
    }

    /// Runs both sides; what each side put out except frames.
    fn run(
        (mut a, hello_a): (Greeting, Frame),
        (mut b, hello_b): (Greeting, Frame),
        wall: UnixTime,
    ) -> [Vec<GreetingOutput>; 2] {
        let mut ends = [vec![], vec![]];
        let mut inboxes = [vec![hello_b], vec![hello_a]];
        while inboxes.iter().any(|i| !i.is_empty()) {
            for (side, machine) in [&mut a, &mut b].into_iter().enumerate() {
                for frame in std::mem::take(&mut inboxes[side]) {
                    let mut out = vec![];
                    machine.handle(START, GreetingInput::Frame { frame, wall }, &mut out);
                    for output in out {
                        match output {
                            GreetingOutput::Send(frame) => inboxes[1 - side].push(frame),
                            other => ends[side].push(other),
                        }
                    }
                }
            }
        }
        ends
    }

    fn shown(outputs: &[GreetingOutput]) -> String {
        let shown = outputs.iter().map(|o| match o {
            GreetingOutput::Send(_) => "send".to_owned(),
            GreetingOutput::Chain(chain) => format!("chain to {}", chain.epoch()),
            GreetingOutput::Revocations(events) => format!("{} revocations", events.len()),
            GreetingOutput::Accepted(_) => "accepted".to_owned(),
            GreetingOutput::Failed(error) => error.to_string(),
        });
        shown.collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn transcripts() {
        let same = trust(&[1]);
        let mut newer = same.clone();
        newer.change_authorities(&key(1), vec![key(1).id(), key(2).id()], NOW).unwrap();
        newer.revoke(&key(2), key(9).id(), true, NOW).unwrap();
        let mut out = same.clone();
        out.revoke(&key(1), key(6).id(), true, NOW).unwrap();
        let other = Trust::found(&key(8), key(1).id(), NOW);
        let late = NOW.plus(super::super::LIFETIME_S + 1000);
        let (six, seven) = (key(6).id().short(), key(7).id().short());
        let foreign = format!(
            "the peer's certificate is refused: the certificate is of node {seven}, shown by {six}"
        );
        for (a, b, wall, ends) in [
            (side(&same, 5, 6), side(&same, 6, 5), NOW, ["accepted", "accepted"]),
            (
                side(&same, 5, 6),
                side(&newer, 6, 5),
                NOW,
                ["chain to 2; 1 revocations; accepted", "accepted"],
            ),
            (
                side(&out, 5, 6),
                side(&same, 6, 5),
                NOW,
                [
                    "the peer's certificate is refused: node rkdv77y6 is revoked",
                    "1 revocations; the peer refused this node: this node has been revoked: an \
                     authority can take that back",
                ],
            ),
            (
                side(&same, 5, 6),
                side(&same, 6, 5),
                late,
                [
                    "the peer's certificate is refused: the certificate expired 1000 s ago (300 s \
                     of clock difference are forgiven)",
                    "the peer's certificate is refused: the certificate expired 1000 s ago (300 s \
                     of clock difference are forgiven)",
                ],
            ),
            (
                side(&same, 5, 6),
                side(&other, 6, 5),
                NOW,
                [
                    "the peer's authority chain is refused: the authority chain is of mesh \
                     kgias4lm, another one",
                    "the peer's authority chain is refused: the authority chain is of mesh \
                     khytmww5, another one",
                ],
            ),
            // The certificate of another node.
            (
                side(&same, 5, 6),
                side(&same, 7, 5),
                NOW,
                [&foreign, "the peer refused this node: a signature does not fit"],
            ),
        ] {
            let [one, two] = run(a, b, wall);
            assert_eq!([shown(&one), shown(&two)], ends);
        }
    }

    #[test]
    fn silence_and_surprises_end_a_greeting() {
        let trust = trust(&[1]);
        let mut out = vec![];
        let (mut silent, hello) = side(&trust, 5, 6);
        silent.handle(START, GreetingInput::Timer, &mut out);
        assert!(out.is_empty());
        silent.handle(START + GREETING_WAIT, GreetingInput::Timer, &mut out);
        assert_eq!(shown(&out), "send; the greeting took more than 10 s");
        assert_eq!(silent.next_deadline(), None);
        for kind in [Kind::PEER_WELCOME, Kind::PEER_CHAIN, Kind::JOIN_HELLO, Kind::RPC_REQUEST] {
            let (mut greeting, _) = side(&trust, 5, 6);
            let mut out = vec![];
            let frame = Frame { kind, body: hello.body.clone() };
            greeting.handle(START, GreetingInput::Frame { frame, wall: NOW }, &mut out);
            assert!(shown(&out).contains("instead of its hello"), "{kind:?}: {}", shown(&out));
        }
        let (mut greeting, _) = side(&trust, 5, 6);
        let mut out = vec![];
        let frame = Frame { kind: Kind(Kind::OPTIONAL | 9), body: vec![1] };
        greeting.handle(START, GreetingInput::Frame { frame, wall: NOW }, &mut out);
        assert!(out.is_empty() && greeting.next_deadline().is_some());
    }

    /// Whatever is changed in a hello, the peer is not accepted by it.
    #[test]
    fn mutations_of_the_hello() {
        let trust = trust(&[1]);
        let (_, hello) = side(&trust, 6, 5);
        for body in mutations(&hello.body) {
            let (mut greeting, _) = side(&trust, 5, 6);
            let mut out = vec![];
            let frame = Frame { kind: Kind::PEER_HELLO, body: body.clone() };
            greeting.handle(START, GreetingInput::Frame { frame, wall: NOW }, &mut out);
            // A change of the hash or the digest asks for the other chain, which changes nothing.
            let certificate = hello.body.len() - 64;
            let same =
                body.len() == hello.body.len() && body[..certificate] == hello.body[..certificate];
            let welcome = |o: &GreetingOutput| matches!(o, GreetingOutput::Send(f) if f.kind == Kind::PEER_WELCOME);
            assert!(same || !out.iter().any(welcome), "{}", shown(&out));
        }
    }

    #[test]
    fn golden() {
        let (_, hello) = side(&trust(&[1]), 5, 6);
        assert_eq!(
            blake3::hash(&hello.encode()).to_hex().as_str(),
            "2d74e563eb2c9c98ab6466958dcac57ec3a0ab5f3f34de6bec04c0a620a5e907",
            "{}",
            super::super::testing::hex(&hello.body)
        );
        let welcome = Frame::new(Kind::PEER_WELCOME, &());
        assert_eq!(welcome.encode(), [0, 0, 0, 0, 1, 19, 0]);
        let refusal = Frame::new(Kind::PEER_REFUSAL, &Refusal::CertificateExpired { ago_s: 5 });
        assert_eq!(refusal.encode(), [2, 0, 0, 0, 1, 20, 0, 7, 5]);
        assert_eq!(wire::encode(&Vec::<SignedSet>::new()), [0]);
    }
}
