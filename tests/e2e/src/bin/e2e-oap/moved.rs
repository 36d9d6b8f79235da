//! Established connections move: an OAP is drained, and gets its share again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use testkit::scenario::{Check, Report};

use crate::checks::{AGENTS_CONNECT_WITHIN, DATA_IS_STORED_WITHIN};
use crate::fixture::{Fixture, slashed};
use crate::layout::{self, AGENTS, ALS};

/// Room for all of them on two OAPs, also for a moment in which one is counted twice.
const QUOTA: u32 = 12;
/// The OAP that is drained.
const DRAINED: usize = 0;
/// Nothing moves for 30 s after the OAPs that are ready have changed, and only what was uneven for
/// 15 s; then one agent moves in a second, once it reports again.
const EVEN_WITHIN: Duration = Duration::from_secs(120);

impl Fixture<'_> {
    /// 4, second half: agents that are told to move lose nothing.
    pub fn agents_move(&mut self, report: &mut Report) -> Result<()> {
        self.set_quota(report, "4", QUOTA)?;
        let since = self.made();
        let backend = AGENTS.backend(DRAINED).to_string();
        let begun = Instant::now();
        self.balancer.must(&["drain", &backend, "--timeout", "60s"]);
        let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
        report.tell("4 OAP 1 drained: empty", &took);
        let step = "4 OAP 1 drained: its agent connections, and all";
        self.wait(report, step, AGENTS_CONNECT_WITHIN, |fixture| {
            let loads = fixture.loads(AGENTS)?.connections;
            let seen = format!("{} of {}", loads[DRAINED], loads.iter().sum::<u32>());
            Ok(Check::new(format!("0 of {}", since.len()), seen))
        })?;
        self.all_is_there(report, "4 OAP 1 drained: numbered segments since", &since)?;

        self.balancer.must(&["undrain", &backend]);
        self.balancer.configure(&layout::evened_out());
        self.balancer.reload();
        let begun = Instant::now();
        let step = "4 OAP 1 put back: agent connections, sorted";
        self.wait(report, step, EVEN_WITHIN, |fixture| {
            let loads = slashed(fixture.loads(AGENTS)?.sorted());
            Ok(Check::new("4/4/3", loads))
        })?;
        let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
        report.tell("4 OAP 1 put back: even", &took);
        self.all_is_there(report, "4 OAP 1 put back: numbered segments since", &since)?;
        self.balancer.configure(&layout::configuration());
        self.balancer.reload();
        self.access_log_moves(report)
    }

    /// Envoy keeps one call, which is ended between two messages.
    fn access_log_moves(&mut self, report: &mut Report) -> Result<()> {
        let before = self.loads(ALS)?.connections;
        let from = before.iter().position(|own| *own > 0).unwrap_or_default();
        let backend = ALS.backend(from).to_string();
        self.balancer.must(&["shed", &backend, "1"]);
        let step = "4 an access log moved: connections of its OAP";
        self.wait(report, step, AGENTS_CONNECT_WITHIN, |fixture| {
            fixture.envoy()?.request()?;
            Ok(Check::new(0, fixture.loads(ALS)?.connections[from]))
        })?;
        let step = "4 an access log moved: connections, sorted";
        self.wait(report, step, AGENTS_CONNECT_WITHIN, |fixture| {
            fixture.envoy()?.request()?;
            Ok(Check::new("1/1/0", slashed(fixture.loads(ALS)?.sorted())))
        })?;
        let (sent, stored) = (self.envoy()?.sent(), self.stored_access_logs()?);
        let seen = format!("{stored} of {sent} are stored by now");
        report.tell("4 an access log moved: numbered access logs", &seen);
        Ok(())
    }

    /// The number of each agent's last segment + 1, by its name.
    fn made(&self) -> BTreeMap<String, u32> {
        let made = self.agents.iter().map(|agent| {
            let number = agent.made().map_or(0, |last| last + 1);
            (agent.name().to_owned(), number)
        });
        made.collect()
    }

    /// Every segment that agents have made since then is in one of the OAPs.
    fn all_is_there(
        &mut self,
        report: &mut Report,
        step: &str,
        since: &BTreeMap<String, u32>,
    ) -> Result<()> {
        let made = self.made();
        let numbers = |name: &String| since[name]..made[name];
        let expected: usize = since.keys().map(|name| numbers(name).len()).sum();
        self.wait(report, step, DATA_IS_STORED_WITHIN, |fixture| {
            let stored = fixture.stored_segments()?;
            let is_stored = |name: &String, number: &u32| {
                let mut of_agent = stored.iter().filter_map(|segments| segments.get(name));
                of_agent.any(|stored| stored.contains(number))
            };
            let seen = since.keys().map(|name| {
                numbers(name)
                    .filter(|number| is_stored(name, number))
                    .count()
            });
            Ok(Check::new(expected, seen.sum::<usize>()))
        })
    }
}
