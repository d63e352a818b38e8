//! What this node is and knows of its mesh: in memory, and durable before anybody hears of it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use protocol::identity::join::{CONTACT_ADDRESSES_MAX, CONTACTS_MAX, Contact, Joined, Refusal};
use protocol::identity::{
    AUTHORITIES_DEFAULT, AuthorityChain, AuthorityError, Certificate, CertificateError,
    ChangeError, Invite, InviteError, InviteUse, Ledger, NodeKey, RedeemError, Redemption,
    RevocationError, Role, Roles, SignedRecord, SignedRevocation, Trust, UnixTime,
};
use protocol::{MeshId, NodeId};
use thiserror::Error;

use super::key_file::{self, KeyFileError};
use super::random;
use super::store::{Store, StoreError, Stored};

/// The wall clock; tests bring their own.
pub type Clock = Arc<dyn Fn() -> UnixTime + Send + Sync>;

/// The clock of the host.
pub fn system_clock() -> Clock {
    Arc::new(|| UnixTime(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())))
}

/// The node's key, its mesh, and the tokens it has seen used. Methods that change something write to
/// the disk and return when it is durable: call them where blocking for a few milliseconds is fine.
pub struct Identity {
    key: NodeKey,
    /// The root's secret half, on the founder.
    root: Option<NodeKey>,
    store: Store,
    clock: Clock,
    state: Mutex<State>,
}

struct State {
    member: Option<Standing>,
    ledger: Ledger,
    contacts: BTreeMap<NodeId, Vec<SocketAddr>>,
}

/// A node's place in a mesh.
#[derive(Clone, Debug)]
pub struct Standing {
    pub trust: Arc<Trust>,
    pub certificate: Certificate,
}

/// Why an operation on the identity failed; nothing has changed unless it says otherwise.
#[derive(Debug, Error)]
pub enum IdentityError {
    #[error(transparent)]
    Key(#[from] KeyFileError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("this node belongs to no mesh")]
    NoMesh,
    #[error("this node belongs to mesh {} already: `vine leave` first, or use another --data", .0.short())]
    OtherMesh(MeshId),
    #[error(transparent)]
    Change(#[from] ChangeError),
    #[error(transparent)]
    Invite(#[from] InviteError),
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Revocation(#[from] RevocationError),
    #[error(transparent)]
    Redeem(#[from] RedeemError),
    #[error("the directory {path} cannot be made")]
    Directory { path: String, source: std::io::Error },
}

impl Identity {
    /// Opens what is under `data`, and makes the node's key if there is none.
    pub fn open(data: &Path, clock: Clock) -> Result<Identity, IdentityError> {
        std::fs::create_dir_all(data).map_err(|source| IdentityError::Directory {
            path: data.display().to_string(),
            source,
        })?;
        // The store's lock comes first: two nodes must not both make a key.
        let store = Store::open(&data.join("mesh.redb"))?;
        let path = data.join("node.key");
        let key = match key_file::read(&path)? {
            Some(key) => key,
            None => {
                let key = NodeKey::from_secret(random());
                key_file::create(&path, &key)?;
                key
            }
        };
        let now = clock();
        let mut ledger = Ledger::default();
        let uses = store.uses()?;
        for used in &uses {
            // What no longer fits has expired.
            let _ = ledger.merge(std::slice::from_ref(used), now);
        }
        let stored = store.mesh(now)?;
        let root = match &stored {
            Some(stored) => key_file::read(&data.join(root_file(stored.trust.mesh())))?,
            None => None,
        };
        let mut contacts = BTreeMap::new();
        let member = stored.map(|Stored { trust, certificate, contacts: known }| {
            contacts.extend(known.into_iter().map(|c| (c.node, c.addresses)));
            Standing { trust: Arc::new(trust), certificate }
        });
        let state = Mutex::new(State { member, ledger, contacts });
        Ok(Identity { key, root, store, clock, state })
    }

    /// Founds a mesh with this node as its first authority. The root's secret key stays under `data`.
    pub fn found(&mut self, data: &Path) -> Result<MeshId, IdentityError> {
        if let Some(standing) = self.standing() {
            return Err(IdentityError::OtherMesh(standing.trust.mesh()));
        }
        let root = NodeKey::from_secret(random());
        let now = self.now();
        let trust = Trust::found(&root, self.id(), now);
        let certificate = trust.issue(&self.key, self.id(), Roles::ALL, serial(), now)?;
        let mesh = trust.mesh();
        key_file::create(&data.join(root_file(mesh)), &root)?;
        self.commit(&mut self.lock(), Arc::new(trust), certificate)?;
        self.root = Some(root);
        Ok(mesh)
    }

    pub fn id(&self) -> NodeId {
        self.key.id()
    }

    pub fn key(&self) -> &NodeKey {
        &self.key
    }

    /// Whether the root's secret key is on this host.
    pub fn has_root(&self) -> bool {
        self.root.is_some()
    }

    pub fn now(&self) -> UnixTime {
        (self.clock)()
    }

    /// This node's place in its mesh, if it has one.
    pub fn standing(&self) -> Option<Standing> {
        self.lock().member.clone()
    }

    /// Whether this node may issue certificates at present.
    pub fn is_authority(&self) -> bool {
        self.standing().is_some_and(|s| s.trust.is_authority(self.id()))
    }

    /// Known nodes and their addresses; `me` first where it is given.
    pub fn contacts(&self, me: Option<Contact>) -> Vec<Contact> {
        let state = self.lock();
        let known = state.contacts.iter().filter(|(node, _)| **node != self.key.id());
        let known = known.map(|(&node, addresses)| Contact { node, addresses: addresses.clone() });
        me.into_iter().chain(known).take(CONTACTS_MAX).collect()
    }

    /// Remembers where a node listens, beside what is known of it. At the bound one that is no authority
    /// makes room.
    pub fn learn_contact(&self, node: NodeId, address: SocketAddr) -> Result<(), IdentityError> {
        let mut state = self.lock();
        let known = state.contacts.get(&node);
        if node == self.key.id() || known.is_some_and(|known| known.contains(&address)) {
            return Ok(());
        }
        let Some(Standing { trust, certificate }) = state.member.clone() else { return Ok(()) };
        if state.contacts.len() >= CONTACTS_MAX && !state.contacts.contains_key(&node) {
            match state.contacts.keys().copied().find(|&n| !trust.is_authority(n)) {
                Some(plain) => drop(state.contacts.remove(&plain)),
                None => return Ok(()),
            }
        }
        let addresses = state.contacts.entry(node).or_default();
        addresses.insert(0, address);
        addresses.truncate(CONTACT_ADDRESSES_MAX);
        self.commit(&mut state, trust, certificate)
    }

    /// Takes over what a join or a renewal brought.
    pub fn adopt(&self, joined: Joined) -> Result<(), IdentityError> {
        let mut state = self.lock();
        let Joined { trust, certificate, peers } = joined;
        let trust = match &state.member {
            Some(Standing { trust: ours, .. }) => {
                if ours.mesh() != trust.mesh() {
                    return Err(IdentityError::OtherMesh(ours.mesh()));
                }
                // What was learned during the exchange must not be lost.
                let mut merged = Trust::clone(ours);
                let events = trust.revocations().iter().cloned().collect();
                merged.merge_chain(trust.chain().clone())?;
                merged.merge_revocations(events, self.now())?;
                merged
            }
            None => trust,
        };
        let id = self.id();
        let known = peers.into_iter().filter(|c| c.node != id).take(CONTACTS_MAX);
        state.contacts.extend(known.map(|c| (c.node, c.addresses)));
        while state.contacts.len() > CONTACTS_MAX {
            state.contacts.pop_first();
        }
        self.commit(&mut state, Arc::new(trust), certificate)
    }

    /// Makes a token.
    pub fn invite(
        &self,
        (roles, uses, ttl_s): (Roles, u16, u64),
        seeds: Vec<SocketAddr>,
    ) -> Result<Invite, IdentityError> {
        let Standing { trust, .. } = self.standing().ok_or(IdentityError::NoMesh)?;
        let now = self.now();
        let grant = (roles, uses, now.plus(ttl_s));
        Ok(Invite::new(&trust, &self.key, random(), grant, seeds, now)?)
    }

    /// Counts a use of a token; durable when this returns.
    ///
    /// # Errors
    /// What the joiner is to be told.
    pub fn redeem(
        &self,
        record: &SignedRecord,
        node: NodeId,
    ) -> Result<Option<InviteUse>, Refusal> {
        let mut state = self.lock();
        let mut ledger = state.ledger.clone();
        match ledger.redeem(&record.body, node, self.now()).map_err(|e| Refusal::from(&e))? {
            Redemption::Again => Ok(None),
            Redemption::Counted(used) => {
                if let Err(error) = self.store.add_uses(std::slice::from_ref(&used)) {
                    tracing::error!(%error, "a token's use cannot be stored: nobody can join");
                    return Err(Refusal::NoAuthority);
                }
                state.ledger = ledger;
                Ok(Some(used))
            }
        }
    }

    /// Every use of a token that this node knows.
    pub fn uses(&self) -> Vec<InviteUse> {
        self.lock().ledger.uses().collect()
    }

    /// Takes over uses that another authority counted; says whether any was new.
    pub fn merge_uses(&self, uses: &[InviteUse]) -> Result<bool, IdentityError> {
        let mut state = self.lock();
        let mut ledger = state.ledger.clone();
        let news = ledger.merge(uses, self.now())?;
        if news > 0 {
            self.store.add_uses(uses)?;
            state.ledger = ledger;
        }
        Ok(news > 0)
    }

    /// Forgets on the disk the uses of tokens that expired long ago.
    pub fn forget_old_uses(&self) -> Result<(), IdentityError> {
        Ok(self.store.retain_uses(self.now(), USES_KEEP_S)?)
    }

    /// Takes over authority sets and revocations; says whether anything was new.
    pub fn merge(
        &self,
        chain: Option<AuthorityChain>,
        events: Vec<SignedRevocation>,
    ) -> Result<bool, IdentityError> {
        self.change(|trust, key, now| {
            let mut news = match chain {
                Some(chain) => trust.merge_chain(chain)?,
                None => false,
            };
            news |= trust.merge_revocations(events, now)? > 0;
            news |= trust.adopt_revocations(key) > 0;
            Ok(news)
        })
    }

    /// Ends or restores a membership. The root's key is used where it is at hand.
    pub fn revoke(&self, node: NodeId, revoked: bool) -> Result<(), IdentityError> {
        let root = self.root.clone();
        self.change(|trust, key, now| {
            let key = if trust.is_authority(key.id()) { key } else { root.as_ref().unwrap_or(key) };
            trust.revoke(key, node, revoked, now)?;
            Ok(true)
        })
        .map(drop)
    }

    /// Adds and removes authorities.
    pub fn change_authorities(
        &self,
        add: &[NodeId],
        remove: &[NodeId],
    ) -> Result<(), IdentityError> {
        let root = self.root.clone();
        self.change(|trust, key, now| {
            let mut members: Vec<NodeId> = trust.authorities().to_vec();
            members.extend(add);
            members.retain(|n| !remove.contains(n));
            let key = if trust.is_authority(key.id()) { key } else { root.as_ref().unwrap_or(key) };
            trust.change_authorities(key, members, now)?;
            Ok(true)
        })
        .map(drop)
    }

    /// Makes a node that just joined an authority, while the mesh has fewer than it gives itself.
    pub fn promote(&self, certificate: &Certificate) -> Result<bool, IdentityError> {
        let node = certificate.body.node;
        self.change(|trust, key, now| {
            let wanted = trust.authorities().len() < AUTHORITIES_DEFAULT
                && certificate.body.roles.contains(Role::Authority)
                && trust.is_authority(key.id())
                && !trust.is_authority(node);
            if wanted {
                let members = trust.authorities().iter().copied().chain([node]).collect();
                trust.change_authorities(key, members, now)?;
            }
            Ok(wanted)
        })
    }

    /// What an authority does for itself: renews its own certificate, and the authority set in the last
    /// third of its life. Says whether it did anything; false also on nodes that must ask for renewal.
    pub fn renew_self(&self) -> Result<bool, IdentityError> {
        let now = self.now();
        let Some(Standing { trust, certificate }) = self.standing() else { return Ok(false) };
        let key = match (&self.root, trust.is_authority(self.id())) {
            (Some(root), _) => root,
            (None, true) => &self.key,
            (None, false) => return Ok(false),
        };
        let set_due = trust.chain().is_due(now);
        if set_due {
            let members = trust.authorities().to_vec();
            self.change(|trust, _, now| {
                trust.change_authorities(key, members, now)?;
                Ok(true)
            })?;
        }
        let Some(Standing { trust, .. }) = self.standing() else { return Ok(set_due) };
        if !trust.is_authority(self.id()) || !certificate.body.is_due(now) {
            return Ok(set_due);
        }
        let roles = certificate.body.roles;
        let renewed = trust.issue(&self.key, self.id(), roles, serial(), now)?;
        self.commit(&mut self.lock(), trust, renewed)?;
        Ok(true)
    }

    /// Forgets the mesh: its certificate, tokens and contacts. The node's key stays. The root's key, if
    /// it is here, stays too: it is the only one.
    pub fn leave(&self) -> Result<(), IdentityError> {
        let mut state = self.lock();
        self.store.clear()?;
        *state = State { member: None, ledger: Ledger::default(), contacts: BTreeMap::new() };
        Ok(())
    }

    /// Changes the trust, durably; says what `change` says.
    fn change(
        &self,
        change: impl FnOnce(&mut Trust, &NodeKey, UnixTime) -> Result<bool, IdentityError>,
    ) -> Result<bool, IdentityError> {
        let mut state = self.lock();
        let Standing { trust, certificate } = state.member.clone().ok_or(IdentityError::NoMesh)?;
        let mut trust = Trust::clone(&trust);
        let news = change(&mut trust, &self.key, self.now())?;
        if news {
            self.commit(&mut state, Arc::new(trust), certificate)?;
        }
        Ok(news)
    }

    fn commit(
        &self,
        state: &mut MutexGuard<'_, State>,
        trust: Arc<Trust>,
        certificate: Certificate,
    ) -> Result<(), IdentityError> {
        let contacts = state.contacts.iter();
        let contacts = contacts.map(|(&node, a)| Contact { node, addresses: a.clone() }).collect();
        let stored =
            Stored { trust: Trust::clone(&trust), certificate: certificate.clone(), contacts };
        self.store.set_mesh(&stored)?;
        state.member = Some(Standing { trust, certificate });
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The file of a root's secret key: named by its mesh, so that two never meet.
fn root_file(mesh: MeshId) -> String {
    format!("root-{}.key", mesh.short())
}

/// The random serial of a certificate.
pub(crate) fn serial() -> u64 {
    u64::from_le_bytes(random())
}

/// How long the use of a token is kept after the token expired, in seconds: longer than the ledger's
/// own memory.
const USES_KEEP_S: u64 = 2 * 86_400;
