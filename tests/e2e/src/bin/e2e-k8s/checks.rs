//! Checks that come up more than once in the scenario.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZero;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use standin::Cause;
use testkit::scenario::{Check, Report, interrupt};

use crate::clients::Mark;
use crate::daemons::{self, Backend, Group, Way};
use crate::fixture::{Fixture, slashed, unevenness};
use crate::kernel;
use crate::layout::{CLIENT_PODS, NODES};
use crate::oaps::Held;

/// Refused clients pause for up to three seconds, several times.
pub const CLIENTS_CONNECT_WITHIN: Duration = Duration::from_secs(60);
/// What happened in the kernel is in the status at once, and with the other daemons two seconds
/// later.
const DAEMONS_FOLLOW_WITHIN: Duration = Duration::from_secs(15);
/// From the listener until the kernel half is in its netns.
const ATTACHED_WITHIN: Duration = Duration::from_secs(1);
/// Addresses that connections come from: each pod's, and that of the clients outside.
const SOURCES: u32 = CLIENT_PODS + 1;
/// A daemon starts; or a pod of the OAP.
pub const PODS_START_WITHIN: Duration = Duration::from_secs(60);

impl Fixture {
    /// All clients have a connection.
    pub fn all_connected(&self, report: &mut Report, step: &str) -> Result<()> {
        let step = format!("{step}: clients with a connection");
        report.wait(&step, CLIENTS_CONNECT_WITHIN, || {
            let tally = self.clients()?.tally(&self.cluster)?;
            Ok(Check::new(tally.clients, tally.connected))
        })
    }

    /// Waits until every client has begun to open a new connection, as it was told at that moment;
    /// or was doing so.
    pub fn reconnected(&self, told: u64) -> Result<()> {
        let deadline = Instant::now() + CLIENTS_CONNECT_WITHIN;
        loop {
            let tally = self.clients()?.tally(&self.cluster)?;
            let outages = tally.outages.iter();
            let new = outages.filter(|outage| {
                let without_one = outage.began < told && outage.ended.is_none_or(|at| at >= told);
                without_one || (outage.began >= told && outage.cause == Cause::Told)
            });
            if u32::try_from(new.count()) == Ok(tally.clients) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "not every client opens a new connection when it is told"
            );
            interrupt::pause(Duration::from_millis(100))?;
        }
    }

    /// No client was without a connection for longer since then.
    pub fn nobody_waited(
        &self,
        report: &mut Report,
        step: &str,
        mark: &Mark,
        longest: Duration,
    ) -> Result<()> {
        let tally = self.clients()?.tally(&self.cluster)?;
        let step = format!("{step}: longest time of a client without one");
        report.check(&step, &Check::within(longest, mark.longest_outage(&tally)))
    }

    /// No client has lost its connection since then.
    pub fn nothing_lost(&self, report: &mut Report, step: &str, mark: &Mark) -> Result<()> {
        let tally = self.clients()?.tally(&self.cluster)?;
        let step = format!("{step}: connections lost");
        report.check(&step, &Check::new(0, mark.lost(&tally)))
    }

    /// The daemons count what the socket tables of the pods hold.
    pub fn counts_are_true(&mut self, report: &mut Report, step: &str, way: Way) -> Result<()> {
        let step = format!("{step}: sockets of the pods (exempt), and counts");
        wait(report, &step, DAEMONS_FOLLOW_WITHIN, "as many", || {
            if way == Way::Exec {
                self.look()?;
            }
            let counted = self.counted(way)?;
            Ok(Check::new(self.show(self.held()), self.show(counted)))
        })
    }

    /// The daemons of all nodes know the same of all OAPs, and that is the truth.
    pub fn views_agree(&mut self, report: &mut Report, step: &str) -> Result<()> {
        let step = format!("{step}: status --cluster, from each node");
        wait(report, &step, DAEMONS_FOLLOW_WITHIN, "the same", || {
            self.look()?;
            let held = self.held();
            let truth: BTreeSet<_> = self
                .oaps
                .iter()
                .zip(held)
                .map(|(oap, held)| format!("{}={}", &oap.name, held.established))
                .collect();
            let expected = format!("{} times {}", self.daemons.len(), truth.len());
            let groups = self.groups(Way::Exec)?;
            let same = groups.iter().filter(|group| {
                let told = living(group).filter_map(|backend| {
                    let established = backend.established?;
                    Some(format!("{}={established}", backend.pod.name))
                });
                told.collect::<BTreeSet<_>>() == truth
            });
            let quotas: BTreeSet<_> = groups.iter().map(quotas).collect();
            let seen = format!(
                "{} times {}{}",
                same.count(),
                truth.len(),
                if quotas.len() > 1 {
                    ", quotas differ"
                } else {
                    ""
                }
            );
            Ok(Check::new(expected, seen))
        })
    }

    /// Each OAP's netns is guarded soon after its listener, or after the daemon of its node was
    /// ready, where `since` says when.
    pub fn attached(
        &mut self,
        report: &mut Report,
        step: &str,
        since: &BTreeMap<String, u64>,
    ) -> Result<()> {
        self.look()?;
        let mut worst = Duration::ZERO;
        for oap in &self.oaps {
            let deadline = Instant::now() + DAEMONS_FOLLOW_WITHIN;
            let guarded = loop {
                match kernel::guarded_since(&self.cluster, &oap.node, oap.cookie) {
                    Some(guarded) => break guarded,
                    None if Instant::now() >= deadline => break u64::MAX,
                    None => interrupt::pause(Duration::from_millis(50))?,
                }
            };
            let daemon = since.get(&oap.node).copied().unwrap_or(0);
            let listens = oap.listens_since(&self.cluster)?.max(daemon);
            worst = worst.max(Duration::from_millis(guarded.saturating_sub(listens)));
        }
        let step = format!(
            "{step}: guarded after the listener, worst of {}",
            self.oaps.len()
        );
        report.check(&step, &Check::within(ATTACHED_WITHIN, worst))
    }

    /// All daemons share the total out among so many OAPs. Says how long it took from `since` on.
    pub fn quotas_follow(
        &mut self,
        report: &mut Report,
        step: &str,
        ready: usize,
        within: Duration,
        since: Instant,
    ) -> Result<()> {
        let phrase = format!("/ {ready} ready)");
        let mut took = None;
        let look = format!("{step}: daemons that compute with {ready} ready");
        wait(report, &look, within, "all", || {
            self.look()?;
            let groups = self.groups(Way::OnNode)?;
            let follow = groups
                .iter()
                .filter(|group| group.sentence.contains(&phrase));
            let check = Check::new(self.daemons.len(), follow.count());
            if check.is_as_expected() {
                took = Some(since.elapsed());
            }
            Ok(check)
        })?;
        let (Some(took), Some(group)) = (took, self.groups(Way::OnNode)?.into_iter().next()) else {
            return Ok(());
        };
        let seen = format!("after {:.1} s: {}", took.as_secs_f64(), group.sentence);
        report.tell(&format!("{step}: quotas follow"), &seen);
        Ok(())
    }

    /// The fullest OAP has not more than the mean by more than the headroom, in percent, of the
    /// total that is shared out, and by one connection for each source that was refused for long.
    /// Of what was observed that is the most of the last minutes, which may be a little more than
    /// there is now.
    pub fn spread(&mut self, report: &mut Report, step: &str, headroom: u32) -> Result<()> {
        self.look()?;
        let all = self.held();
        // Who is exempt now, because it comes through the OAP's own node, may have counted before.
        let most = 1.1 * f64::from(all.iter().map(|held| held.established).sum::<u32>());
        let held: Vec<u32> = all.into_iter().map(Held::admitted).collect();
        let admitted = f64::from(held.iter().sum::<u32>().max(1));
        let group = self.groups(Way::OnNode)?.into_iter().next();
        let group = group.context("there is a daemon")?;
        let total = total(&group).with_context(|| group.sentence.clone())?;
        report.check(
            &format!("{step}: total that is shared out"),
            &Check::judged(
                format!("{admitted} to {most:.0}"),
                total,
                (admitted..=most).contains(&total),
            ),
        )?;
        let seen = unevenness(&held);
        let fullest = f64::from(held.iter().copied().max().unwrap_or(0));
        let most = (1.0 + f64::from(headroom) / 100.0) * total.max(admitted) / admitted;
        // A quota is rounded up.
        let share = (most * mean(&held)).ceil();
        let more = most_over(&group, share);
        let step = format!("{step}: max/mean (without: {:.2})", self.uneven);
        let check = Check::judged(
            format!("at most {most:.2} (and {more} more)"),
            format!("{seen:.3}: {} of {}", slashed(&held), quotas(&group)),
            more <= f64::from(SOURCES) && fullest <= share + more,
        );
        report.check(&step, &check)
    }

    /// No OAP has more than its quota, but for connections that opened at the same moment on
    /// several processors.
    pub fn within_quotas(&self, report: &mut Report, step: &str) -> Result<()> {
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        let more = 2 * u32::try_from(processors).unwrap_or(1);
        let groups = self.groups(Way::OnNode)?;
        let over = groups.iter().flat_map(living).filter(|backend| {
            let counts = backend.established.zip(backend.exempt);
            let admitted = counts.map(|(established, exempt)| established - exempt);
            let over = backend.quota.zip(admitted);
            over.is_some_and(|(quota, admitted)| admitted > quota + more)
        });
        report.check(
            &format!("{step}: OAPs over their quota"),
            &Check::new(0, over.count()),
        )
    }

    /// Every node that runs has a daemon that is ready, none of the ones that are told.
    pub fn daemons_ready(
        &mut self,
        report: &mut Report,
        step: &str,
        not: &BTreeSet<String>,
    ) -> Result<()> {
        let step = format!("{step}: daemons that are ready");
        let nodes = NODES
            .iter()
            .filter(|node| self.cluster.kubernetes.runs(node))
            .count();
        wait(report, &step, PODS_START_WITHIN, "all", || {
            self.daemons = daemons::look(&self.cluster)?;
            let ready = self.daemons.values().filter(|daemon| daemon.ready);
            let new = ready.filter(|daemon| !not.contains(&daemon.uid));
            Ok(Check::new(nodes, new.count()))
        })
    }

    /// Waits until there are so many OAPs, all ready.
    pub fn wait_oaps(&mut self, replicas: u32) -> Result<()> {
        let deadline = Instant::now() + PODS_START_WITHIN;
        loop {
            let looked = self.look();
            let ready = self.oaps.iter().filter(|oap| oap.ready).count();
            let all = ready == self.oaps.len() && u32::try_from(ready) == Ok(replicas);
            if all && looked.is_ok() {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "there are not {replicas} OAPs that are ready: {ready} of {} {looked:?}",
                self.oaps.len()
            );
            interrupt::pause(Duration::from_millis(100))?;
        }
    }
}

/// A row, once things are as expected or the time is up. Unlike with [`Report::wait`] what can't be
/// seen yet is no reason to give up, but for a signal.
pub fn wait(
    report: &mut Report,
    step: &str,
    within: Duration,
    expected: &str,
    mut look: impl FnMut() -> Result<Check>,
) -> Result<()> {
    report.wait(step, within, || {
        let seen = look();
        interrupt::check()?;
        Ok(seen.unwrap_or_else(|error| Check::judged(expected, format!("{error:#}"), false)))
    })
}

/// The backends whose pods are not being ended.
pub fn living(group: &Group) -> impl Iterator<Item = &Backend> {
    group.backends.iter().filter(|backend| !backend.terminating)
}

/// The quotas of a group, without repeating what is the same: `115`, `92/115`, `unlimited`.
pub fn quotas(group: &Group) -> String {
    let quotas = living(group).map(|backend| backend.quota.unwrap_or(u32::MAX));
    let different: BTreeSet<u32> = quotas.collect();
    let shown = different.iter().map(|quota| match *quota {
        u32::MAX => "unlimited".to_owned(),
        quota => quota.to_string(),
    });
    slashed(shown)
}

/// The connections that the sentence shares out: those of `ceil(400 connections (observed) …`.
fn total(group: &Group) -> Option<f64> {
    let (_, rest) = group.sentence.split_once("ceil(")?;
    rest.split(' ').next()?.parse().ok()
}

/// By how much the largest quota is more than a share.
fn most_over(group: &Group, share: f64) -> f64 {
    let limits = living(group).filter_map(|backend| backend.quota);
    let largest = limits.max().map_or(0.0, f64::from);
    (largest - share).max(0.0)
}

fn mean(held: &[u32]) -> f64 {
    let number = u32::try_from(held.len().max(1)).unwrap_or(u32::MAX);
    f64::from(held.iter().sum::<u32>().max(1)) / f64::from(number)
}
