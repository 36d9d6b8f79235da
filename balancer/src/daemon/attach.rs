//! Which network namespaces are guarded, and keeping `steer` attached to them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, ErrorKind};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use balancer_common::abi::{Backend, BackendId};
use tracing::{info, warn};

use super::search::NetnsSearch;
use crate::config::NetnsScope;
use crate::dataplane::look::{Depth, worth_a_look};
use crate::dataplane::{Found, SlotView, Writer};
use crate::discover::{
    Look, Netns, NetnsHint, OpenNetns, Place, Thread, UnreachableNetns, look_everywhere,
};
use crate::sys::file_id::FileId;
use crate::sys::limits::{seen, spare_files};
use crate::sys::sock_diag::Socket;
use crate::sys::{memory, netns};

/// How many network namespaces are held open at a time, to be guarded.
const AT_ONCE: usize = 8;

/// So many descriptors are left for everything else that the daemon does.
const SPARE_FILES: u64 = 64;

/// Which network namespaces an audit looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every network namespace where any may be guarded; else the own and the named ones.
    Everywhere,
    /// The own and the named network namespaces, and those where backends are known.
    Known,
}

/// The guarded network namespaces.
pub struct GuardedNetns {
    /// The network namespace of this process, where it is guarded.
    own: Option<OpenNetns>,
    /// The network namespaces that the configuration names.
    named: BTreeMap<PathBuf, Named>,
    /// Every other network namespace is guarded as soon as a backend listens there.
    any: bool,
    /// With `any`: the cookies of the network namespaces that may be guarded; `None`: all may.
    only: Option<HashSet<u64>>,
    /// With `any`: the cookies of network namespaces that were found, guarded or about to be, with
    /// the place where they were found; `None`: none is known.
    found: HashMap<u64, Option<Place>>,
    /// With `any`: the search for those that are at no known place.
    search: NetnsSearch,
    /// Network namespaces that `steer` could not be attached to, and why.
    refused: BTreeMap<u64, String>,
    /// Network namespaces that could not be entered at the last look at all.
    unreachable: HashSet<FileId>,
    /// When this round is to end.
    until: Instant,
    /// This round has left something to the next one.
    unfinished: bool,
}

/// A network namespace that the configuration names.
#[derive(Debug, Default)]
struct Named {
    /// Its cookie; `None`: there is none at that path now.
    cookie: Option<u64>,
    /// The last look could not tell.
    in_doubt: bool,
}

impl Named {
    /// Takes in what a look at the path has found. Only where nothing has that name, or another
    /// network namespace, the one that it led to is gone.
    fn update(&mut self, path: &Path, look: io::Result<u64>) {
        let now = match look {
            Ok(cookie) => Some(cookie),
            Err(error) if is_absent(&error) => None,
            Err(error) => {
                if !std::mem::replace(&mut self.in_doubt, true) {
                    warn!(
                        "cannot look at the network namespace {}: {error}. What is in force there \
                         stays in force",
                        path.display()
                    );
                }
                return;
            }
        };
        self.in_doubt = false;
        if self.cookie != now {
            let what = if now.is_some() { "there" } else { "gone" };
            info!("the network namespace {} is {what}", path.display());
            self.cookie = now;
        }
    }
}

/// Whether nothing has the name that was looked at.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// A netns that is to be opened when it has its turn.
enum Target {
    Own(OpenNetns),
    Named(PathBuf, u64),
    Found(NetnsHint),
}

impl Target {
    const fn cookie(&self) -> u64 {
        match self {
            Self::Own(OpenNetns { cookie, .. }) | Self::Named(_, cookie) => *cookie,
            Self::Found(hint) => hint.cookie,
        }
    }

    /// `None`: it is not there any more. A path may lead to another one than at the last
    /// [`GuardedNetns::refresh`]: the next one will see that.
    fn open(self) -> io::Result<Option<OpenNetns>> {
        match self {
            Self::Own(own) => Ok(Some(own)),
            Self::Found(hint) => Ok(hint.open()?.map(|found| found.open)),
            Self::Named(path, cookie) => {
                let Some(file) = seen(netns::open(&path))? else {
                    return Ok(None);
                };
                let there = seen(netns::cookie_of(&file))?;
                Ok((there == Some(cookie)).then_some(OpenNetns { cookie, file }))
            }
        }
    }
}

/// An audit that goes on from round to round: one pass over the network namespaces.
pub struct AuditPass {
    scope: Scope,
    /// The cookies of the own and the named network namespaces.
    named: HashSet<u64>,
    /// What is looked at first.
    targets: std::vec::IntoIter<Target>,
    /// What is looked at then.
    everywhere: Option<Box<dyn Iterator<Item = Result<Look>> + Send>>,
    unreachable: Vec<UnreachableNetns>,
    /// The processor time that it has taken.
    pub cost: Duration,
}

/// A look at the health of backends that goes on from round to round: one pass over the network
/// namespaces where they are.
pub struct LookPass {
    /// How far it goes.
    pub depth: Depth,
    targets: std::vec::IntoIter<Target>,
    /// What went wrong first.
    pub failed: Option<anyhow::Error>,
    /// The processor time that it has taken.
    pub cost: Duration,
}

impl AuditPass {
    /// Which network namespaces it looks at.
    pub const fn scope(&self) -> Scope {
        self.scope
    }
}

impl GuardedNetns {
    /// Finds the network namespaces of the configuration. One that is named and not there is waited
    /// for.
    ///
    /// # Errors
    /// When this process's own can't be opened.
    pub fn resolve(scope: &NetnsScope) -> Result<Self> {
        let mut guarded = Self {
            own: None,
            named: BTreeMap::new(),
            any: matches!(scope, NetnsScope::All | NetnsScope::Pods),
            only: (*scope == NetnsScope::Pods).then(HashSet::new),
            found: HashMap::new(),
            search: NetnsSearch::new(),
            refused: BTreeMap::new(),
            unreachable: HashSet::new(),
            until: Instant::now(),
            unfinished: false,
        };
        match scope {
            NetnsScope::Own | NetnsScope::All => guarded.own = Some(own()?),
            NetnsScope::Pods => {}
            NetnsScope::Paths(paths) => {
                let named = |path: &PathBuf| (path.clone(), Named::default());
                guarded.named = paths.iter().map(named).collect();
                guarded.refresh();
                let absent = |named: &Named| named.cookie.is_none() && !named.in_doubt;
                for (path, _) in guarded.named.iter().filter(|(_, named)| absent(named)) {
                    warn!(
                        "the network namespace {} is not there (`ip netns` lists named ones): \
                         waiting for it",
                        path.display()
                    );
                }
            }
        }
        Ok(guarded)
    }

    /// Looks whether the network namespaces that the configuration names have come, gone or become
    /// others.
    pub fn refresh(&mut self) {
        for (path, named) in &mut self.named {
            named.update(path, netns::open(path).and_then(netns::cookie_of));
        }
    }

    /// Begins a round that is to end then.
    pub const fn begin_round(&mut self, until: Instant) {
        self.until = until;
        self.unfinished = false;
    }

    /// Whether the last round has left something that goes on at once.
    pub const fn is_unfinished(&self) -> bool {
        self.unfinished || self.search.is_under_way()
    }

    fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }

    /// Cookies of the network namespaces that are guarded whether a backend listens there or not.
    pub fn named_cookies(&self) -> Vec<u64> {
        let own = self.own.iter().map(|own| own.cookie);
        own.chain(self.named.values().filter_map(|named| named.cookie))
            .collect()
    }

    /// Whether listeners of any network namespace are wanted.
    pub const fn any(&self) -> bool {
        self.any
    }

    /// Whether SYNs in that network namespace are steered, or are about to be.
    pub fn covers(&self, cookie: u64) -> bool {
        self.named_cookies().contains(&cookie)
            || (self.found.contains_key(&cookie) && self.may_guard(cookie))
    }

    /// Lets only these network namespaces be guarded, where any might be.
    pub fn restrict_to(&mut self, cookies: HashSet<u64>) {
        self.only = Some(cookies);
    }

    fn may_guard(&self, cookie: u64) -> bool {
        self.only.as_ref().is_none_or(|only| only.contains(&cookie))
    }

    /// Attaches `steer` to the own and the named network namespaces where it is not yet, until the
    /// round is over. One that can't be attached to is tried again later.
    ///
    /// # Errors
    /// When the kernel refuses it for the own one.
    pub fn attach_named(&mut self, writer: &mut Writer) -> Result<()> {
        for target in self.named_targets()? {
            let cookie = target.cookie();
            if writer.loader.guards(cookie) || !self.search.is_due(cookie, &[]) {
                continue;
            }
            if self.unfinished {
                break;
            }
            let is_own = matches!(target, Target::Own(_));
            match attach(target, writer) {
                Err(error) if is_own => return Err(error),
                Err(error) => self.put_off(cookie, &error),
                Ok(()) => {
                    self.refused.remove(&cookie);
                }
            }
            self.unfinished = self.is_over();
        }
        Ok(())
    }

    /// What of this machine can't be guarded, and why; `None`: all of it is.
    pub fn problem(&self) -> Option<String> {
        let error = self.refused.values().next()?;
        Some(format!(
            "connections to {} of its network namespaces are counted, and neither steered nor \
             refused: {error}",
            self.refused.len()
        ))
    }

    fn put_off(&mut self, cookie: u64, error: &anyhow::Error) {
        self.refused.insert(cookie, format!("{error:#}"));
        if self.search.put_off(cookie) {
            warn!(
                "cannot guard the network namespace with cookie {cookie}, which is tried again \
                 later: {error:#}"
            );
        }
    }

    /// With `any`: opens a few of the network namespaces where backends listen and `steer` is not
    /// attached, those that are `wanted`. What is at none of its known places is searched for until
    /// the round is over.
    ///
    /// # Errors
    /// When the slots or the network namespaces can't be read.
    pub fn find_unguarded(
        &mut self,
        writer: &mut Writer,
        wanted: impl Fn(u64) -> bool,
    ) -> Result<Vec<OpenNetns>> {
        if !self.any {
            return Ok(Vec::new());
        }
        let slots = writer.tables.slots()?;
        let hints = self.hints(&slots);
        let cookies = hints.iter().map(|hint| hint.cookie).collect();
        self.search.retain(&cookies);
        let named: HashSet<u64> = self.named_cookies().into_iter().collect();
        (self.refused).retain(|cookie, _| cookies.contains(cookie) || named.contains(cookie));
        let mut found = Vec::new();
        for hint in hints {
            let guarded = writer.loader.guards(hint.cookie);
            let place = if guarded {
                // An earlier daemon may have found it.
                *self.found.entry(hint.cookie).or_insert(None)
            } else {
                None
            };
            let is_needed = if guarded {
                place.is_none()
            } else {
                wanted(hint.cookie)
            };
            if !is_needed || !self.search.is_due(hint.cookie, &hint.places) {
                continue;
            }
            if found.len() >= AT_ONCE {
                self.unfinished = true;
                break;
            }
            match hint.open().context("cannot open a network namespace")? {
                Some(netns) if guarded => self.note(hint.cookie, netns.place),
                Some(netns) => found.push(netns.open),
                None => self.search.lose(hint),
            }
        }
        self.search_on(writer, &slots, &mut found)?;
        Ok(found)
    }

    fn note(&mut self, cookie: u64, place: Place) {
        self.found.insert(cookie, Some(place));
    }

    /// Goes on with the search until the round is over.
    fn search_on(
        &mut self,
        writer: &mut Writer,
        slots: &[SlotView],
        found: &mut Vec<OpenNetns>,
    ) -> Result<()> {
        let mut gone = Vec::new();
        while found.len() < AT_ONCE
            && let Some(netns) = self.search.go_on(self.until, &mut gone)?
        {
            let cookie = netns.open.cookie;
            self.note(cookie, netns.place);
            if !writer.loader.guards(cookie) {
                found.push(netns.open);
            }
        }
        for cookie in gone {
            drop_adopted(slots, cookie, writer);
        }
        Ok(())
    }

    /// Attaches `steer` to network namespaces that were found, until the round is over, but to one
    /// at the least.
    pub fn attach_to(&mut self, found: &[OpenNetns], writer: &mut Writer) {
        for OpenNetns { cookie, file } in found {
            let guarded =
                ensure_spare_files().and_then(|()| writer.loader.guard(file.as_fd(), *cookie));
            match guarded {
                Ok(()) => {
                    self.refused.remove(cookie);
                    self.found.entry(*cookie).or_insert(None);
                    info!("guarding the network namespace with cookie {cookie}");
                }
                Err(error) => {
                    self.found.remove(cookie);
                    self.put_off(*cookie, &error);
                }
            }
            if self.is_over() {
                self.unfinished = true;
                break;
            }
        }
        if !found.is_empty() {
            memory::give_back();
        }
    }

    /// Takes `steer` off the network namespaces that are gone or not wanted any more.
    ///
    /// # Errors
    /// When the slots can't be read or a pin can't be removed.
    pub fn detach_unwanted(&mut self, writer: &mut Writer) -> Result<()> {
        let mut wanted: HashSet<u64> = self.named_cookies().into_iter().collect();
        for (cookie, inode) in writer.loader.guarded()? {
            if inode.is_none() {
                writer.audit.drop_netns(&writer.tables, cookie)?;
                self.found.remove(&cookie);
                wanted.remove(&cookie);
            }
        }
        if self.any {
            let slots = writer.tables.slots()?;
            let listened_in: HashSet<u64> =
                slots.iter().map(|slot| slot.member.backend.netns).collect();
            self.found.retain(|cookie, _| listened_in.contains(cookie));
            let found = self.found.keys().copied();
            wanted.extend(found.filter(|cookie| self.may_guard(*cookie)));
        }
        writer.loader.unguard_others(&wanted)
    }

    /// Begins to compare the counts of the guarded network namespaces with the socket table, and to
    /// register what listens there unregistered.
    ///
    /// # Errors
    /// When the slots or the processes can't be read.
    pub fn begin_audit(&self, writer: &mut Writer, scope: Scope) -> Result<AuditPass> {
        writer.audit.begin(&writer.tables)?;
        let mut targets = self.named_targets()?;
        let named: HashSet<u64> = targets.iter().map(Target::cookie).collect();
        let everywhere = self.any && scope == Scope::Everywhere;
        if !everywhere {
            targets.extend(self.found_targets(writer, &named)?);
        }
        let everywhere = everywhere.then(look_everywhere).transpose()?;
        Ok(AuditPass {
            scope,
            named,
            targets: targets.into_iter(),
            everywhere: everywhere.map(|looks| Box::new(looks) as Box<_>),
            unreachable: Vec::new(),
            cost: Duration::ZERO,
        })
    }

    /// With `any`: the network namespaces where backends are known, but for the `named` ones.
    fn found_targets(&self, writer: &Writer, named: &HashSet<u64>) -> Result<Vec<Target>> {
        if !self.any {
            return Ok(Vec::new());
        }
        let mut hints = self.hints(&writer.tables.slots()?);
        hints.retain(|hint| self.found.contains_key(&hint.cookie) && !named.contains(&hint.cookie));
        Ok(hints.into_iter().map(Target::Found).collect())
    }

    /// Begins to look at the health of backends.
    ///
    /// # Errors
    /// When the slots can't be read.
    pub fn begin_look(&self, writer: &mut Writer, depth: Depth) -> Result<LookPass> {
        writer.looks.tidy(&writer.tables)?;
        let mut targets = self.named_targets()?;
        let named: HashSet<u64> = targets.iter().map(Target::cookie).collect();
        targets.extend(self.found_targets(writer, &named)?);
        let wanted = worth_a_look(&writer.tables)?;
        targets.retain(|target| wanted.contains(&target.cookie()));
        Ok(LookPass {
            depth,
            targets: targets.into_iter(),
            failed: None,
            cost: Duration::ZERO,
        })
    }

    /// Goes on with a look until the round is over, with one step at the least; true: it is at its
    /// end. A netns that can't be looked at does not keep the others from their turn.
    pub fn look(&self, writer: &mut Writer, pass: &mut LookPass) -> bool {
        while let Some(target) = pass.targets.next() {
            let looked = target.open().context("cannot open a network namespace");
            let looked = looked.and_then(|netns| {
                // One that is not there any more the audit searches for.
                let Some(OpenNetns { cookie, file }) = netns else {
                    return Ok(());
                };
                netns::inside(&file, || writer.look(cookie, pass.depth))
                    .context("cannot enter a network namespace")
                    .flatten()
            });
            if let Err(error) = looked {
                pass.failed.get_or_insert(error);
            }
            if self.is_over() {
                return pass.targets.len() == 0;
            }
        }
        true
    }

    /// The connections of backends that can be moved, by backend; none where a netns is not there
    /// any more. The socket table of each netns is read once.
    ///
    /// # Errors
    /// When a netns or its socket table can't be read.
    pub fn connections(
        &self,
        writer: &Writer,
        backends: &[SlotView],
    ) -> Result<HashMap<BackendId, Vec<Socket>>> {
        self.look_for(writer, backends, Writer::connections)
    }

    /// All established connections of backends, of each whether it can be moved.
    ///
    /// # Errors
    /// As [`GuardedNetns::connections`].
    pub fn all_connections(
        &self,
        writer: &Writer,
        backends: &[SlotView],
    ) -> Result<HashMap<BackendId, Vec<Found>>> {
        self.look_for(writer, backends, Writer::all_connections)
    }

    fn look_for<T: Send>(
        &self,
        writer: &Writer,
        backends: &[SlotView],
        look: impl Fn(&Writer, &[SlotView]) -> Result<Vec<(BackendId, T)>> + Send + Sync,
    ) -> Result<HashMap<BackendId, Vec<T>>> {
        let mut targets = self.named_targets()?;
        let named: HashSet<u64> = targets.iter().map(Target::cookie).collect();
        targets.extend(self.found_targets(writer, &named)?);
        let mut connections: HashMap<BackendId, Vec<T>> = HashMap::new();
        for target in targets {
            let there = backends.iter().copied();
            let there: Vec<SlotView> = there
                .filter(|view| view.member.backend.netns == target.cookie())
                .collect();
            if there.is_empty() {
                continue;
            }
            let Some(netns) = target.open().context("cannot open a network namespace")? else {
                continue;
            };
            let found = netns::inside(&netns.file, || look(writer, &there))
                .context("cannot enter a network namespace")
                .flatten()?;
            for (backend, one) in found {
                connections.entry(backend).or_default().push(one);
            }
        }
        Ok(connections)
    }

    /// Goes on with an audit until the round is over, with one step at the least; true: it is at
    /// its end. Each netns is open only for as long as it is looked at. One that can't be looked
    /// at, other than the own and the named ones, is left out.
    ///
    /// # Errors
    /// When the own or a named network namespace, or its sockets, can't be read, or there is not
    /// enough memory or descriptors to look on.
    pub fn audit(&mut self, writer: &mut Writer, pass: &mut AuditPass) -> Result<bool> {
        let eager = pass.scope == Scope::Everywhere;
        loop {
            if let Some(target) = pass.targets.next() {
                let cookie = target.cookie();
                match target.open().context("cannot open a network namespace")? {
                    Some(netns) => check(&netns, writer, eager, pass.named.contains(&cookie))?,
                    // It is searched for.
                    None => {
                        self.found.entry(cookie).and_modify(|place| *place = None);
                    }
                }
            } else {
                let looks = pass.everywhere.as_mut();
                match looks.and_then(Iterator::next).transpose()? {
                    None => {
                        self.warn_of(&pass.unreachable);
                        return Ok(true);
                    }
                    Some(Look::Nothing) => {}
                    Some(Look::Unreachable(netns)) => pass.unreachable.push(netns),
                    Some(Look::Found(netns)) => {
                        let Netns { pid, tid, .. } = netns;
                        self.note(netns.cookie, Place::Thread(Thread { pid, tid }));
                        if !pass.named.contains(&netns.cookie) {
                            check(&netns.into(), writer, eager, false)?;
                        }
                    }
                }
            }
            if self.is_over() {
                return Ok(false);
            }
        }
    }

    /// The own and the named network namespaces that are there.
    fn named_targets(&self) -> Result<Vec<Target>> {
        let mut targets = Vec::new();
        if let Some(own) = &self.own {
            let file = own.file.try_clone().context("cannot copy a descriptor")?;
            targets.push(Target::Own(OpenNetns { file, ..*own }));
        }
        let named = self.named.iter();
        targets.extend(
            named.filter_map(|(path, named)| Some(Target::Named(path.clone(), named.cookie?))),
        );
        Ok(targets)
    }

    /// The network namespaces of slots, with the places where they may be.
    fn hints(&self, slots: &[SlotView]) -> Vec<NetnsHint> {
        let mut places: BTreeMap<u64, Vec<Place>> = BTreeMap::new();
        for slot in slots {
            let Backend {
                netns, pid, tid, ..
            } = slot.member.backend;
            let places = places.entry(netns).or_default();
            places.push(Place::Thread(Thread { pid, tid }));
        }
        let hint = |(cookie, mut places): (u64, Vec<Place>)| {
            let known = self.found.get(&cookie).copied().flatten();
            places.splice(0..0, known);
            NetnsHint { cookie, places }
        };
        places.into_iter().map(hint).collect()
    }

    /// Warns of the network namespaces that can't be entered, of each once.
    fn warn_of(&mut self, unreachable: &[UnreachableNetns]) {
        for UnreachableNetns { id, pid, error } in unreachable {
            if !self.unreachable.contains(id) {
                warn!(
                    "cannot enter the network namespace of process {pid}: {error}. What listens \
                     there is not counted and takes no connections of a service, the others are \
                     guarded: see what forbids it (a security module, a sandbox), or name the \
                     wanted ones in `namespaces:`"
                );
            }
        }
        self.unreachable = unreachable.iter().map(|netns| netns.id).collect();
    }
}

fn own() -> Result<OpenNetns> {
    let file = netns::current().context("cannot open this process's network namespace")?;
    let cookie = netns::cookie().context("cannot read the cookie of a network namespace")?;
    Ok(OpenNetns { cookie, file })
}

fn attach(target: Target, writer: &mut Writer) -> Result<()> {
    ensure_spare_files()?;
    match target.open().context("cannot open it")? {
        Some(netns) => writer.loader.guard(netns.file.as_fd(), netns.cookie),
        None => Ok(()),
    }
}

/// What is guarded takes a descriptor for as long as it is, and must not take the last one.
fn ensure_spare_files() -> Result<()> {
    let spare = spare_files().context("cannot count the open files")?;
    ensure!(
        spare >= SPARE_FILES,
        "only {spare} more files may be opened, which the daemon needs for its other work: raise \
         its limit (`ulimit -n`, LimitNOFILE=)"
    );
    Ok(())
}

/// Audits one netns. What fails in one that the configuration does not name is no failure of the
/// audit.
fn check(netns: &OpenNetns, writer: &mut Writer, eager: bool, is_named: bool) -> Result<()> {
    let cookie = netns.cookie;
    let checked = netns::inside(&netns.file, || writer.check(cookie, eager))
        .context("cannot enter a network namespace")
        .flatten();
    match checked {
        Err(error) if !is_named => {
            warn!("cannot audit the network namespace with cookie {cookie}: {error:#}");
            Ok(())
        }
        checked => checked,
    }
}

/// Nobody tells when an adopted listener closes, and nothing is left to look at.
fn drop_adopted(slots: &[SlotView], cookie: u64, writer: &mut Writer) {
    let adopted = slots
        .iter()
        .map(|slot| &slot.member.backend)
        .any(|backend| backend.netns == cookie && backend.flags & Backend::ADOPTED != 0);
    if adopted && let Err(error) = writer.audit.drop_netns(&writer.tables, cookie) {
        warn!("cannot close the backends of a network namespace that is gone: {error:#}");
    }
}
