//go:build unix

package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pgxdrain/pgxdrain/examples/internal/process"
	"github.com/pgxdrain/pgxdrain/examples/internal/servicetest"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"sigs.k8s.io/yaml"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m).Run()) }

func TestKubernetes(t *testing.T) {
	t.Parallel()
	program := process.Build(t)
	servicetest.Test(t, program)

	t.Run("the probes of the manifest are answered", func(t *testing.T) {
		t.Parallel()
		deployment, _, _ := manifest(t)
		container := &deployment.Spec.Template.Spec.Containers[0]
		s := servicetest.Start(t, program, nil)
		for _, probe := range []*corev1.Probe{container.StartupProbe, container.ReadinessProbe, container.LivenessProbe} {
			if a := s.Do("GET", probe.HTTPGet.Path); a.Status != http.StatusOK {
				t.Errorf("%s: %d %v", probe.HTTPGet.Path, a.Status, a.Err)
			}
		}
		sent := time.Now()
		s.Signal(syscall.SIGTERM)
		s.WaitFor("new work is refused") // after the propagation, which nobody has shortened here
		if took := time.Since(sent); took < propagation {
			t.Errorf("requests are refused after %v, before the propagation is over", took)
		}
		s.EndsWithin(process.Limit, sent, 0)
	})

	t.Run("as process 1 of a container it gets the signal", func(t *testing.T) {
		t.Parallel()
		unshare, err := exec.LookPath("unshare")
		if err != nil || os.Getuid() != 0 {
			t.Skip("needs root and unshare")
		}
		if out, err := exec.CommandContext(t.Context(), unshare, "--pid", "--fork", "--mount-proc", "true").CombinedOutput(); err != nil {
			t.Skipf("needs the right to make a PID namespace: %v %s", err, out)
		}
		static := filepath.Join(t.TempDir(), "service")
		build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s", "-o", static)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		command := []string{unshare, "--pid", "--fork", "--mount-proc", "--kill-child", static}
		s := servicetest.StartCommand(t, command, nil, "pool_initial_wait=0")
		slow := s.InFlight("/api/data?ms=3000", 1)
		sent := time.Now()
		if err := syscall.Kill(processOne(t, s.PID()), syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if a := <-slow; a.Status != http.StatusOK {
			t.Errorf("%d %v", a.Status, a.Err)
		}
		s.EndsWithin(process.Limit, sent, 0)
	})
}

// processOne returns the PID of unshare's child, which is 1 in its own namespace.
func processOne(t *testing.T, unshare int) int {
	t.Helper()
	proc := "/proc/" + strconv.Itoa(unshare)
	children, err := os.ReadFile(proc + "/task/" + strconv.Itoa(unshare) + "/children")
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(children)))
	if err != nil {
		t.Fatalf("not one child: %q", children)
	}
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`(?m)^NSpid:.*\t1$`).Match(status) {
		t.Fatalf("it is not process 1:\n%s", status)
	}
	return pid
}

// manifest decodes deployment.yaml and lets no unknown or repeated field pass.
func manifest(t *testing.T) (d appsv1.Deployment, s corev1.Service, b policyv1.PodDisruptionBudget) {
	t.Helper()
	text, err := os.ReadFile("deployment.yaml")
	if err != nil {
		t.Fatal(err)
	}
	objects := bytes.Split(text, []byte("\n---\n"))
	if len(objects) != 3 {
		t.Fatalf("%d objects", len(objects))
	}
	for i, object := range []any{&d, &s, &b} {
		if err := yaml.UnmarshalStrict(objects[i], object); err != nil {
			t.Fatal(err)
		}
	}
	return d, s, b
}

func TestManifestGivesThePodTheTimeThatTheServiceTakes(t *testing.T) {
	t.Parallel()
	deployment, _, _ := manifest(t)
	pod := deployment.Spec.Template.Spec
	preStop := time.Duration(pod.Containers[0].Lifecycle.PreStop.Sleep.Seconds) * time.Second
	grace := time.Duration(*pod.TerminationGracePeriodSeconds) * time.Second

	timeout := defaultTimeout
	if i := slices.IndexFunc(pod.Containers[0].Env, func(e corev1.EnvVar) bool { return e.Name == "SHUTDOWN_TIMEOUT" }); i >= 0 {
		var err error
		if timeout, err = time.ParseDuration(pod.Containers[0].Env[i].Value); err != nil {
			t.Fatal(err)
		}
	}
	const margin = 2 * time.Second // for the kubelet and the runtime
	if sum := preStop + timeout + margin; sum > grace {
		t.Errorf("preStop %v + timeout %v + margin %v = %v, and SIGKILL comes after %v", preStop, timeout, margin, sum, grace)
	}
	const atLeast = 10 * time.Second // for requests in flight
	if drain := timeout*4/5 - propagation - cancelGrace; drain < atLeast {
		t.Errorf("of %v the propagation of %v and the cancel grace of %v leave %v for the drain", timeout, propagation, cancelGrace, drain)
	}
}

// cancelGrace is pgxdrain's default, which main.go leaves as it is.
const cancelGrace = 2 * time.Second

func TestManifestFitsTheService(t *testing.T) {
	t.Parallel()
	deployment, service, budget := manifest(t)
	pod := deployment.Spec.Template.Spec
	c := pod.Containers[0]
	if got := strconv.Itoa(int(c.Ports[0].ContainerPort)); got != defaultPort || c.Ports[0].Name != "http" {
		t.Errorf("port %s %s, the service listens on %s", c.Ports[0].Name, got, defaultPort)
	}
	for name, path := range map[*corev1.Probe]string{
		c.StartupProbe: "/health/live", c.LivenessProbe: "/health/live", c.ReadinessProbe: "/health/ready",
	} {
		if got := name.HTTPGet; got.Path != path || got.Port.String() != "http" {
			t.Errorf("probe %s:%s, want %s", got.Port.String(), got.Path, path)
		}
	}
	labels := deployment.Spec.Template.Labels["app"]
	if labels == "" || service.Spec.Selector["app"] != labels || budget.Spec.Selector.MatchLabels["app"] != labels ||
		deployment.Spec.Selector.MatchLabels["app"] != labels || service.Spec.Ports[0].TargetPort.String() != "http" {
		t.Error("the selectors do not go with the pods")
	}
	if got := deployment.Spec.Strategy.RollingUpdate.MaxUnavailable.IntValue(); got != 0 || *deployment.Spec.Replicas != 3 ||
		budget.Spec.MinAvailable.IntValue() >= int(*deployment.Spec.Replicas) {
		t.Errorf("replicas %d, max unavailable %d, min available %d: nothing could be drained, or all at once",
			*deployment.Spec.Replicas, got, budget.Spec.MinAvailable.IntValue())
	}
	if !*pod.SecurityContext.RunAsNonRoot || !*c.SecurityContext.ReadOnlyRootFilesystem || *c.SecurityContext.AllowPrivilegeEscalation {
		t.Error("it may do more than it needs")
	}
	for _, e := range c.Env {
		if e.Name == "DATABASE_URL" && (e.Value != "" || e.ValueFrom.SecretKeyRef == nil) {
			t.Error("the database's password is in the manifest")
		}
	}
}

func TestDockerfileMakesTheServiceProcessOne(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	stages := strings.Split(string(text), "\nFROM ") // the first is the comment above them
	last := stages[len(stages)-1]
	entrypoint := regexp.MustCompile(`(?m)^ENTRYPOINT (.*)$`).FindStringSubmatch(last)
	var command []string
	if entrypoint == nil || json.Unmarshal([]byte(entrypoint[1]), &command) != nil || len(command) != 1 {
		t.Errorf("ENTRYPOINT %q is not a list of the service alone", entrypoint)
	}
	user := regexp.MustCompile(`(?m)^USER (\d+):\d+$`).FindStringSubmatch(last)
	deployment, _, _ := manifest(t)
	if user == nil || user[1] != strconv.FormatInt(*deployment.Spec.Template.Spec.SecurityContext.RunAsUser, 10) || user[1] == "0" {
		t.Errorf("USER %q is not the manifest's", user)
	}
	if len(stages) != 3 || !strings.Contains(stages[1], "CGO_ENABLED=0") ||
		strings.Contains(last, "CMD") || !strings.Contains(last, "EXPOSE "+defaultPort) {
		t.Errorf("not a static program alone in its image:\n%s", text)
	}
}
