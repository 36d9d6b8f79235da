//! How long agents take to come back: when all OAPs have refused them for a while and some have
//! room again, and when their OAP ends.
//!
//! An agent is *connected* when its connection is established, and *reports* from the moment that
//! it made the first segment that an OAP has stored since. Python agents keep the segments that
//! they can't send, so that moment can't be told for them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use testkit::fixtures::Service;
use testkit::scenario::{Check, Report, interrupt};

use crate::agents::{Kind, Settings};
use crate::checks::{AGENTS_CONNECT_WITHIN, DAEMON_FOLLOWS_WITHIN};
use crate::fixture::Fixture;
use crate::layout::{self, AGENTS, NODES};

/// How long nobody has room. gRPC's pauses have grown by then as they do in an OAP's restart.
const REFUSED_FOR: Duration = Duration::from_secs(60);
/// gRPC's longest pause between two attempts is two minutes, and a little more by chance.
const BACK_WITHIN: Duration = Duration::from_secs(200);
/// After the last one is connected: until all report, and what they report is stored.
const REPORTED_AFTER: Duration = Duration::from_secs(75);
const BETWEEN_LOOKS: Duration = Duration::from_millis(250);
/// Room for all agents on each OAP.
const ROOM: u32 = 100;
/// The agent's own, and some that help.
const SETTINGS: [(&str, Settings); 2] = [
    ("defaults", Settings::DEFAULT),
    (
        "check_interval 5, force_reconnection_period 0",
        Settings {
            check_interval: 5,
            force_reconnection_period: 0,
        },
    ),
];
const JAVA: usize = 8;
const PYTHON: usize = 4;

/// Agents that are refused, let in, and lose their OAP.
struct Case<'a> {
    step: String,
    collector: String,
    kinds: Vec<Kind>,
    /// The services that they are told of.
    services: &'a [String],
    /// How many of these, the first ones, never have room.
    full: usize,
}

impl Fixture<'_> {
    /// Measures all of it, with one address and with three, one of which has no room.
    pub fn time_agents(&mut self, report: &mut Report) -> Result<()> {
        self.oaps_join(report)?;
        for (name, settings) in SETTINGS {
            let mut kinds = vec![Kind::JavaWith(settings); JAVA];
            kinds.extend([Kind::Python; PYTHON]);
            self.configure(&layout::configuration());
            self.time_case(
                report,
                &Case {
                    step: format!("one address, {name}"),
                    collector: layout::one_address(),
                    kinds,
                    services: &[AGENTS.name.to_owned()],
                    full: 0,
                },
            )?;
        }
        let services: Vec<_> = (0..NODES).map(layout::name_of_one).collect();
        for (name, settings) in SETTINGS {
            self.configure(&layout::one_by_one());
            self.time_case(
                report,
                &Case {
                    step: format!("three addresses, {name}"),
                    collector: layout::three_addresses(),
                    kinds: vec![Kind::JavaWith(settings); JAVA],
                    services: &services,
                    full: 1,
                },
            )?;
        }
        Ok(())
    }

    fn configure(&self, yaml: &str) {
        self.balancer.configure(yaml);
        self.balancer.reload();
    }

    fn time_case(&mut self, report: &mut Report, case: &Case<'_>) -> Result<()> {
        let step = &case.step;
        for service in case.services {
            self.wait_for_backends(report, service, NODES / case.services.len())?;
            self.balancer.quota_set(service, None, 0);
        }
        let agents = self.start_agents_of(&case.collector, &case.kinds)?;
        self.wait(
            report,
            &format!("{step}: agents that run"),
            AGENTS_CONNECT_WITHIN,
            |fixture| {
                let running = fixture.agents.iter().filter(|agent| agent.made().is_some());
                Ok(Check::new(agents.len(), running.count()))
            },
        )?;
        interrupt::pause(REFUSED_FOR)?;
        let begun = Instant::now();
        for service in &case.services[case.full..] {
            self.balancer.quota_set(service, None, ROOM);
        }
        let let_in = format!("{step}: refused for a minute, then room");
        self.time(report, &let_in, begun, &agents)?;
        let homes = self.homes()?;
        let (_, victim) = *homes.first().context("somebody is connected")?;
        let moved = self.agents_of(victim)?;
        let begun = Instant::now();
        self.cluster.kill(victim);
        self.time(report, &format!("{step}: the OAP ends"), begun, &moved)?;
        self.agents.clear();
        self.cluster.launch(victim)
    }

    fn wait_for_backends(
        &mut self,
        report: &mut Report,
        service: &str,
        count: usize,
    ) -> Result<()> {
        let step = format!("{service}: active backends");
        self.wait(report, &step, 15 * DAEMON_FOLLOWS_WITHIN, |fixture| {
            let status = fixture.balancer.status();
            let found = status.services.iter().find(|found| found.name == service);
            Ok(Check::new(count, found.map_or(0, Service::active)))
        })
    }

    /// Tells when these agents are connected again, and since when they report.
    fn time(
        &mut self,
        report: &mut Report,
        step: &str,
        begun: Instant,
        agents: &BTreeSet<String>,
    ) -> Result<()> {
        let made = |fixture: &Self| -> BTreeMap<String, u32> {
            let made = fixture.select(agents);
            made.map(|agent| (agent.name().to_owned(), agent.made().unwrap_or(0)))
                .collect()
        };
        let before = made(self);
        let mut connected = BTreeMap::new();
        let mut history = Vec::new();
        let mut last = begun;
        while last.elapsed() < REPORTED_AFTER && begun.elapsed() < BACK_WITHIN + REPORTED_AFTER {
            for (name, _) in self.homes()? {
                if agents.contains(&name) && !connected.contains_key(&name) {
                    connected.insert(name, begun.elapsed());
                }
            }
            if connected.len() < agents.len() {
                last = Instant::now();
            }
            history.push((begun.elapsed(), made(self)));
            interrupt::pause(BETWEEN_LOOKS)?;
        }
        let stored = self.stored_segments()?;
        let reports = |name: &String| {
            let since = *before.get(name)? + 1;
            let numbers = stored.iter().filter_map(|segments| segments.get(name));
            let first = *numbers
                .filter_map(|numbers| numbers.range(since..).next())
                .min()?;
            let then = history.iter().find(|(_, made)| made[name] >= first)?;
            Some(then.0)
        };
        for language in ["java", "python"] {
            let names = || agents.iter().filter(|name| name.starts_with(language));
            if names().count() == 0 {
                continue;
            }
            let back: Vec<_> = names()
                .filter_map(|name| connected.get(name).copied())
                .collect();
            report.tell(
                &format!("{step}: {language}, connected after"),
                &spread(back),
            );
            if language == "java" {
                let back = names().filter_map(reports).collect();
                report.tell(&format!("{step}: {language}, reports after"), &spread(back));
            }
        }
        report.check(
            &format!("{step}: agents that are connected"),
            &Check::new(agents.len(), connected.len()),
        )
    }
}

/// The least, the median and the most of times, and all of them.
fn spread(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let seconds = |time: &Duration| format!("{:.1}", time.as_secs_f64());
    let (Some(least), Some(most)) = (times.first(), times.last()) else {
        return "none".to_owned();
    };
    let median = seconds(&times[times.len() / 2]);
    let all: Vec<_> = times.iter().map(seconds).collect();
    format!(
        "{} / {median} / {} s ({})",
        seconds(least),
        seconds(most),
        all.join(" ")
    )
}
