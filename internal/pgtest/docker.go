package pgtest

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/testcontainers/testcontainers-go"
	tclog "github.com/testcontainers/testcontainers-go/log"
	"github.com/testcontainers/testcontainers-go/modules/postgres"
)

const (
	defaultImage = "postgres:17-alpine"

	// An engine that is there answers in milliseconds.
	dockerEngineTimeout = 5 * time.Second
	dockerStartTimeout  = time.Minute
	// With time to pull the image, since no other way is left.
	dockerOnlyStartTimeout = 5 * time.Minute
	// 10 s is what testcontainers gives the server before it is killed.
	dockerStopTimeout = 30 * time.Second
)

// testcontainers' default logger writes a dozen lines to standard error for each container. It cannot be replaced for one
// call, and is replaced only when there is a container to start.
var silenceTestcontainers = sync.OnceFunc(func() { tclog.SetDefault(tclog.NewNoopLogger()) })

// startDocker starts a container. only says that no other way is left to try after it.
func startDocker(ctx context.Context, only bool) (_ *Server, err error) {
	defer func() {
		// testcontainers panics, for one, when the engine goes away while it is asked about its socket.
		if r := recover(); r != nil {
			err = fmt.Errorf("testcontainers panicked: %v", r)
		}
	}()
	silenceTestcontainers()

	image := cmp.Or(os.Getenv(envImage), defaultImage)
	timeout := dockerStartTimeout
	if only {
		timeout = dockerOnlyStartTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("a container of %s was not ready within %v", image, timeout))
	defer cancel()

	// The engine is looked up once in a process, whatever comes of it. Without this call testcontainers would do it without
	// a bound, and wait for minutes on a DOCKER_HOST that drops what it is sent.
	engineCtx, cancel := context.WithTimeoutCause(ctx, dockerEngineTimeout,
		fmt.Errorf("the engine did not answer within %v", dockerEngineTimeout))
	defer cancel()
	engine, err := testcontainers.NewDockerClientWithOpts(engineCtx)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("no Docker engine: %w", err), context.Cause(engineCtx))
	}

	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	pulls := &pullLog{}
	if !only {
		// A second attempt is not worth its wait while another way is left.
		pulls.giveUp = giveUp
	}

	name := "pgxdrain-" + strings.ToLower(rand.Text()[:12])
	var mind *minder
	if testcontainers.ReadConfig().Config.RyukDisabled {
		// Before the container is made, so that there is no moment at which only this process knows of it.
		if mind, err = mindContainer(engine.DaemonHost(), name); err != nil {
			return nil, err
		}
	}
	password := newPassword()
	container, err := postgres.Run(ctx, image,
		testcontainers.WithName(name),
		testcontainers.WithLogger(pulls),
		postgres.WithPassword(password),
		// As in the local way, see localSettings.
		testcontainers.WithCmd("postgres", "-c", "fsync=off", "-c", "full_page_writes=off", "-c", "max_connections=500"),
		postgres.BasicWaitStrategies(),
	)
	end := func() error {
		// Not the caller's context: what was started is ended even if that is done.
		ctx, cancel := context.WithTimeout(context.Background(), dockerStopTimeout)
		defer cancel()
		if container != nil {
			if err := container.Terminate(ctx); err != nil {
				return errors.Join(err, mind.wait(dockerStopTimeout)) // which tries to remove it
			}
		}
		mind.tell("gone\n")
		return mind.wait(dockerStopTimeout)
	}
	fail := func(err error) (*Server, error) {
		cause := context.Cause(ctx)
		if cause != nil {
			err = cause // err says no more than that a context was done
		}
		if pull := pulls.failure(); pull != nil {
			if !errors.Is(err, pull) {
				err = fmt.Errorf("%w: %w", err, pull)
			}
		} else if container == nil && cause != nil {
			// The context was done while the engine made the container, and it may appear yet.
			return nil, errors.Join(err, mind.wait(dockerStopTimeout))
		}
		return nil, errors.Join(err, end())
	}
	if err != nil {
		return fail(err)
	}
	mind.tell("up\n")
	dsn, err := container.ConnectionString(ctx, "sslmode=disable")
	if err != nil {
		return fail(err)
	}
	if err := connectUntil(ctx, dsn); err != nil {
		return fail(err)
	}
	return &Server{dsn: dsn, place: name, stop: end}, nil
}

// pullLog is the logger that testcontainers gets. It says nothing, but hears that an image could not be pulled:
// testcontainers tries again until its context is done, and then returns that and not the reason.
type pullLog struct {
	giveUp context.CancelCauseFunc // if not nil, called at the first failure

	mu  sync.Mutex
	err error // why the last attempt failed
}

func (l *pullLog) Printf(format string, args ...any) {
	if !strings.HasPrefix(format, "Failed to pull image") {
		return
	}
	err := errors.New(strings.TrimSuffix(fmt.Sprintf(format, args...), ", will retry"))
	l.mu.Lock()
	l.err = err
	l.mu.Unlock()
	if l.giveUp != nil {
		l.giveUp(err)
	}
}

func (l *pullLog) failure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}
