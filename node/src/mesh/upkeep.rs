//! What a member does by itself: renews its certificate, tells news, stays connected to known nodes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bincode::{Decode, Encode};
use protocol::identity::join::{Contact, JoinError, Purpose, Refusal};
use protocol::identity::{
    AuthorityChain, Certificate, InviteUse, SignedRevocation, SignedSet, Trust,
};
use protocol::{NodeId, wire};
use tokio::sync::Semaphore;

use super::connections::{Connections, TRUST_DEADLINE, blocking, chain_text};
use super::exchange::{self, Asked};
use super::identity::Standing;
use super::limits::MeshCounters;
use super::random;
use super::rpc::{CODE_FAILED, Call, CallError, Heard, Request, TRUST, TRUST_DIGEST};

/// What members tell each other when something is new, and now and then one of them at random.
#[derive(Encode, Decode)]
struct TrustUpdate {
    /// The sender's, which may have been renewed since the greeting.
    certificate: Certificate,
    links: Vec<SignedSet>,
    revocations: Vec<SignedRevocation>,
    /// Between authorities only.
    uses: Vec<InviteUse>,
}

impl Connections {
    /// Answers [`TRUST`].
    pub(super) async fn trust(self: &Arc<Self>, call: Call) -> Result<(), CallError> {
        let Call { from, request, stream } = call;
        let update = wire::decode::<TrustUpdate, UPDATE_BYTES_MAX>(&request.body);
        let Some(Standing { trust, .. }) = self.identity.standing() else {
            return stream.refuse(CODE_FAILED, "this node belongs to no mesh").await;
        };
        let chain = match update {
            Ok(TrustUpdate { certificate, links, revocations, uses }) => {
                AuthorityChain::verify(trust.root(), links)
                    .map(|chain| (certificate, chain, revocations, uses))
                    .map_err(|e| e.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        let (certificate, chain, revocations, uses) = match chain {
            Ok(update) => update,
            Err(why) => return stream.refuse(CODE_FAILED, &why).await,
        };
        let counts_uses = trust.is_authority(from) && trust.is_authority(self.identity.id());
        let identity = self.identity.clone();
        let merged = blocking(move || {
            let mut news = identity.merge(Some(chain), revocations)?;
            if counts_uses {
                news |= identity.merge_uses(&uses)?;
            }
            Ok::<bool, super::IdentityError>(news)
        });
        match merged.await {
            Ok(news) => {
                let standing = self.identity.standing();
                let now = self.identity.now();
                if standing.is_some_and(|s| s.trust.check(&certificate, from, now).is_ok()) {
                    self.renewed(from, &certificate);
                }
                if news {
                    self.enforce();
                    self.news.notify_one();
                }
                stream.reply(Vec::new()).await
            }
            Err(error) => stream.refuse(CODE_FAILED, &error.to_string()).await,
        }
    }

    /// Answers [`TRUST_DIGEST`]; `certificate` is the caller's as it is known here.
    pub(super) async fn compare_trust(
        self: &Arc<Self>,
        certificate: Certificate,
        call: Call,
    ) -> Result<(), CallError> {
        let known = self.trust_digest(call.from, &certificate);
        let is_same = known.is_some_and(|known| known[..] == call.request.body[..]);
        call.stream.reply(if is_same { Vec::new() } else { vec![1] }).await
    }

    /// What this node and `node` tell each other, in short: the same at both ends if there is no news.
    /// `certificate` is that of the one who asks.
    fn trust_digest(&self, node: NodeId, certificate: &Certificate) -> Option<[u8; 16]> {
        let Standing { trust, .. } = self.identity.standing()?;
        let counts_uses = trust.is_authority(node) && trust.is_authority(self.identity.id());
        let mut hasher = blake3::Hasher::new_derive_key("grapevine trust digest 1");
        hasher.update(&trust.head().0);
        hasher.update(&trust.revocations().digest());
        hasher.update(&wire::encode(certificate));
        if counts_uses {
            hasher.update(&wire::encode(&self.identity.uses()));
        }
        hasher.finalize().as_bytes()[..16].try_into().ok()
    }

    /// Tells `node` everything unless it knows that.
    async fn tell_if_new(self: &Arc<Self>, node: NodeId) -> Result<(), CallError> {
        let Some(Standing { certificate, .. }) = self.identity.standing() else { return Ok(()) };
        let Some(digest) = self.trust_digest(node, &certificate) else { return Ok(()) };
        let request = Request::new(TRUST_DIGEST, TRUST_DEADLINE, digest.to_vec());
        let mut stream = self.call(node, &request).await?;
        stream.finish();
        match stream.next(TRUST_DEADLINE).await? {
            Heard::Reply(body) if body.is_empty() => Ok(()),
            _ => self.tell(node).await,
        }
    }

    /// Tells `node` everything; authorities also hear of every use of a token.
    pub(super) async fn tell(self: &Arc<Self>, node: NodeId) -> Result<(), CallError> {
        let Some(Standing { trust, certificate }) = self.identity.standing() else {
            return Ok(());
        };
        let counts_uses = trust.is_authority(node) && trust.is_authority(self.identity.id());
        let uses = if counts_uses { self.identity.uses() } else { Vec::new() };
        let mut parts: Vec<_> = uses.chunks(USES_PER_UPDATE_MAX).map(<[_]>::to_vec).collect();
        if parts.is_empty() {
            parts.push(Vec::new());
        }
        for uses in parts {
            let links = trust.chain().links().to_vec();
            let revocations = trust.revocations().iter().cloned().collect();
            let certificate = certificate.clone();
            let update = TrustUpdate { certificate, links, revocations, uses };
            let body = wire::encode(&update);
            let request = Request::new(TRUST, TRUST_DEADLINE, body);
            let mut stream = self.call(node, &request).await?;
            stream.finish();
            match stream.next(TRUST_DEADLINE).await? {
                Heard::Reply(_) => {}
                Heard::Part(_) | Heard::End => {
                    return Err(CallError::Unexpected { node, kind: 0 });
                }
            }
        }
        Ok(())
    }

    /// Renews and tells until the mesh stops.
    pub(super) async fn keep_up(self: Arc<Self>) {
        let mut tick = tokio::time::interval(UPKEEP_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let serial = |this: &Self| this.identity.standing().map(|s| s.certificate.body.serial);
        let mut told_serial = serial(&self);
        loop {
            let is_news = tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.news.notified() => true,
                _ = tick.tick() => false,
            };
            self.renew().await;
            self.enforce();
            let is_renewed = serial(&self) != told_serial;
            told_serial = serial(&self);
            let peers: Vec<NodeId> = self.all().iter().map(|c| c.link.peer()).collect();
            let told = match (is_news, self.identity.standing()) {
                // Everybody has to know the new certificate, or would disconnect when the old one expires.
                _ if is_renewed => peers,
                (true, Some(Standing { trust, .. })) => {
                    let (first, rest): (Vec<NodeId>, Vec<NodeId>) =
                        peers.into_iter().partition(|&n| trust.is_authority(n));
                    first.into_iter().chain(some_of(rest, FANOUT)).collect()
                }
                (false, _) => some_of(peers, 1),
                (true, None) => Vec::new(),
            };
            for node in told {
                let this = self.clone();
                self.tasks.spawn(async move {
                    let told = match is_news || is_renewed {
                        true => this.tell(node).await,
                        false => this.tell_if_new(node).await,
                    };
                    if let Err(error) = told {
                        tracing::debug!(%error, "a member could not be told the news");
                    }
                });
            }
        }
    }

    /// Renews the certificate when it is due: an authority by itself, others by asking one.
    pub(super) async fn renew(self: &Arc<Self>) {
        let identity = self.identity.clone();
        let renewed = blocking(move || {
            let forgotten = identity.forget_old_uses();
            identity.renew_self().and_then(|renewed| forgotten.map(|()| renewed))
        });
        match renewed.await {
            Ok(true) => tracing::info!("this authority renewed its own certificate"),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "the certificate cannot be renewed"),
        }
        let Some(Standing { trust, certificate }) = self.identity.standing() else { return };
        let now = self.identity.now();
        if !certificate.body.is_due(now) || trust.is_authority(self.identity.id()) {
            return;
        }
        let mut contacts = self.identity.contacts(None);
        contacts.sort_by_key(|c| !trust.is_authority(c.node));
        let purpose = Purpose::Renewal { trust: Trust::clone(&trust), certificate };
        match self.obtain(&purpose, contacts, RENEWAL_TIMEOUT).await {
            Ok(()) => tracing::info!("certificate renewed"),
            Err(tried) => {
                let tried = tried.join("; ");
                tracing::warn!(tried, "the certificate could not be renewed yet");
            }
        }
    }

    /// Asks one node after the other for a certificate, and follows where they point. What may pass by
    /// itself, as a lost connection or too many joiners at once, is tried again.
    ///
    /// # Errors
    /// What each of them said the last time.
    pub(super) async fn obtain(
        self: &Arc<Self>,
        purpose: &Purpose,
        contacts: Vec<Contact>,
        within: Duration,
    ) -> Result<(), Vec<String>> {
        let deadline = Instant::now() + within;
        let mut unreachable = 0;
        loop {
            let NotObtained { tried, again } =
                match self.ask_each(purpose, contacts.clone(), deadline).await {
                    Ok(()) => return Ok(()),
                    Err(failed) => failed,
                };
            let wait = match again {
                Some(Again::Unreachable) => {
                    unreachable += 1;
                    UNREACHABLE_WAIT
                }
                Some(Again::After(wait)) => wait.max(UNREACHABLE_WAIT),
                None => return Err(tried),
            };
            if unreachable >= UNREACHABLE_ROUNDS_MAX || Instant::now() + wait >= deadline {
                return Err(tried);
            }
            let why = tried.join("; ");
            tracing::warn!(why, wait_s = wait.as_secs(), "no certificate yet: asking again");
            tokio::time::sleep(wait).await;
        }
    }

    /// One round of [`Connections::obtain`].
    async fn ask_each(
        self: &Arc<Self>,
        purpose: &Purpose,
        contacts: Vec<Contact>,
        deadline: Instant,
    ) -> Result<(), NotObtained> {
        let mut open: Vec<Contact> = contacts;
        open.reverse();
        let (mut asked, mut tried, mut again) = (Vec::<NodeId>::new(), Vec::new(), None);
        while let Some(contact) = open.pop() {
            let wanted = (contact.node.0 != [0; 32]).then_some(contact.node);
            for address in contact.addresses {
                if Instant::now() >= deadline {
                    tried.push("no more time".to_owned());
                    return Err(NotObtained { tried, again: None });
                }
                let link = match self.endpoint.dial(address, wanted).await {
                    Ok(link) => link,
                    Err(error) => {
                        MeshCounters::add(&self.counters.dials_failed);
                        tried.push(chain_text(&error));
                        again = again.max(Some(Again::Unreachable));
                        continue;
                    }
                };
                let peer = link.peer();
                let limits = self.limits.clone();
                let asking = exchange::ask(&link, &self.identity, purpose.clone(), limits).await;
                link.close(0, "done");
                asked.push(peer);
                match asking {
                    Ok(Asked::Joined(joined)) => {
                        let mut joined = *joined;
                        // The address that works is known by now.
                        let known = joined.peers.iter_mut().find(|c| c.node == peer);
                        match known {
                            Some(known) if !known.addresses.contains(&address) => {
                                known.addresses.insert(0, address);
                            }
                            Some(_) => {}
                            None => {
                                joined.peers.push(Contact { node: peer, addresses: vec![address] });
                            }
                        }
                        let identity = self.identity.clone();
                        let adopted = blocking(move || identity.adopt(joined)).await;
                        return adopted
                            .map_err(|e| NotObtained { tried: vec![chain_text(&e)], again: None });
                    }
                    Ok(Asked::Elsewhere(contacts)) => {
                        tried.push(elsewhere_text(peer, &contacts));
                        let new = contacts.into_iter().filter(|c| !asked.contains(&c.node));
                        open.extend(new.rev());
                    }
                    Err(error) => {
                        again = again.max(Again::after(&error));
                        tried.push(format!("{address}: {error}"));
                    }
                }
                break;
            }
        }
        Err(NotObtained { tried, again })
    }

    /// Dials known nodes that are not connected, with a growing wait for each.
    pub(super) async fn stay_connected(self: Arc<Self>) {
        let dials = Arc::new(Semaphore::new(self.limits.dials_max));
        let (first, last) = self.limits.dial_backoff;
        let mut waits: BTreeMap<NodeId, (Instant, Duration)> = BTreeMap::new();
        let mut tick = tokio::time::interval(DIAL_INTERVAL);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            let Some(Standing { trust, .. }) = self.identity.standing() else { continue };
            for contact in self.identity.contacts(None) {
                let node = contact.node;
                if self.to(node).is_some() {
                    waits.remove(&node);
                    continue;
                }
                let (due, wait) = waits.get(&node).copied().unwrap_or((Instant::now(), first));
                if Instant::now() < due || trust.revocations().is_revoked(node) {
                    continue;
                }
                let Ok(permit) = dials.clone().try_acquire_owned() else { break };
                // Half of the wait is random, so that nodes which start together spread out.
                let jitter = f64::from(u32::from_le_bytes(random())) / f64::from(u32::MAX);
                let next = wait.mul_f64(0.5 + jitter / 2.0);
                waits.insert(node, (Instant::now() + next, (wait * 2).min(last)));
                let this = self.clone();
                self.tasks.spawn(async move {
                    let _permit = permit;
                    for address in contact.addresses {
                        match this.connect(address, Some(node)).await {
                            Ok(_) => return,
                            Err(why) => {
                                MeshCounters::add(&this.counters.dials_failed);
                                tracing::debug!(peer = %node.short(), %address, why, "no connection");
                            }
                        }
                    }
                });
            }
            waits.retain(|node, _| self.to(*node).is_none());
        }
    }
}

/// Why a round of asking brought no certificate.
struct NotObtained {
    /// What each node said.
    tried: Vec<String>,
    /// Whether another round may bring one.
    again: Option<Again>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Again {
    /// A node could not be reached, or the connection to it broke.
    Unreachable,
    /// A node asked to come back after this time.
    After(Duration),
}

impl Again {
    fn after(error: &JoinError) -> Option<Again> {
        match error {
            JoinError::Refused(Refusal::Busy { retry_s }) => {
                Some(Again::After(Duration::from_secs(*retry_s)))
            }
            JoinError::Timeout { .. } | JoinError::Closed { .. } => Some(Again::Unreachable),
            _ => None,
        }
    }
}

/// Up to `count` of them, drawn at random.
pub(super) fn some_of(mut nodes: Vec<NodeId>, count: usize) -> Vec<NodeId> {
    let mut drawn = Vec::new();
    while drawn.len() < count && !nodes.is_empty() {
        let at = u64::from_le_bytes(random()) as usize % nodes.len();
        drawn.push(nodes.swap_remove(at));
    }
    drawn
}

fn elsewhere_text(peer: NodeId, contacts: &[Contact]) -> String {
    match contacts {
        [] => format!("{} knows no authority that can be asked", peer.short()),
        contacts => {
            let names: Vec<_> = contacts.iter().map(|c| c.node.short()).collect();
            format!("{} says that {} must be asked", peer.short(), names.join(", "))
        }
    }
}

/// How often a member looks whether something is to be done.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(30);
/// How often a member looks for known nodes that are not connected.
const DIAL_INTERVAL: Duration = Duration::from_millis(250);
/// Members besides the authorities that are told news at once; they tell others.
const FANOUT: usize = 8;
const USES_PER_UPDATE_MAX: usize = 4096;
const UPDATE_BYTES_MAX: usize = 2 << 20;
const RENEWAL_TIMEOUT: Duration = Duration::from_secs(60);
/// Rounds in which nodes that cannot be reached are asked for a certificate. Too small: a lost packet too
/// many fails a join. Too large: a wrong address is found out late, each costs `handshake_timeout`.
const UNREACHABLE_ROUNDS_MAX: u32 = 2;
const UNREACHABLE_WAIT: Duration = Duration::from_secs(1);
